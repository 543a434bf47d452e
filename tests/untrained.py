"""An untrained pipeline in the sizes of a small embedded one: all parts are real, none has learned anything."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from spellchecker import SpellChecker
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_VOCABULARY = 4096
_START, _END = "<|startoftext|>", "<|endoftext|>"


def make_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """Small networks of SDXL's classes with random weights that depend on `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(_VOCABULARY)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=64,
            scaling_factor=0.13025,
            force_upcast=True,
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        )
        return StableDiffusionXLPipeline(
            vae=autoencoder,
            text_encoder=CLIPTextModel(text_config(tokenizer, 32)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 32)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="leading",
                steps_offset=1,
            ),
            add_watermarker=False,
        )


def text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """A two-layer CLIP text encoder of this width over the tokenizer's vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_tokenizer(vocabulary: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE over English words by frequency; as in CLIP, late ids are rare pieces of words."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=_END))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    words = SpellChecker(language="en").word_frequency.dictionary
    common = sorted((word for word in words if word.isascii()), key=lambda word: (-words[word], word))[:20_000]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(alphabet) - 2,
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    # The square root keeps rare words in sight of the merges, as running text would by its length.
    bpe.train_from_iterator((f"{word} " * max(1, int(words[word] ** 0.5 / 50)) for word in common), trainer)
    return clip_tokenizer(bpe)


def clip_tokenizer(bpe: Tokenizer) -> CLIPTokenizer:
    """A `CLIPTokenizer` with the vocabulary and merges of a trained BPE, specials last as in CLIP."""
    import json

    state: dict[str, Any] = json.loads(bpe.to_str())["model"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(merge) for merge in state["merges"]]
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for special in (_START, _END):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
