import numpy as np
import torch
from diffusers import DDIMScheduler

from dreambooth.embedded.build.unet import _conditioned, new_scheduler, stratified_timesteps


def test_timesteps_cover_the_schedule_in_a_batch_and_each_row_over_time():
    drawn = torch.stack([stratified_timesteps(8, 1000, torch.Generator().manual_seed(s)) for s in range(200)])
    assert torch.equal((drawn // 125).sort(dim=1).values, torch.arange(8).expand(200, 8))
    for row in range(8):
        assert len((drawn[:, row] // 125).unique()) == 8


def test_the_schedule_ends_in_pure_noise_and_leaves_latents_unclipped():
    scheduler = new_scheduler()
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.config.prediction_type == "v_prediction"
    assert not scheduler.config.clip_sample
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999


def test_the_micro_conditioning_tells_crops_and_small_originals_from_the_rest():
    pixels = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    out, ids = _conditioned(pixels, start=0)
    untouched = (out == pixels).flatten(1).all(1).numpy()
    small, cropped = ids[:, 0] < 32, ids[:, 2:4].any(1)
    assert 0.05 < small.mean() < 0.25
    assert cropped.any()
    assert not untouched[small | cropped].any()
    assert (ids[:, 0] > 32).mean() > 0.3
    assert untouched[ids[:, 0] > 32].all()
    assert (ids[:, 4:] == 32).all()
    again, same = _conditioned(pixels[50:60], start=50)
    assert np.array_equal(ids[50:60], same)
    assert torch.equal(out[50:60], again)
