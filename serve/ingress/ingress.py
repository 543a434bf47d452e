"""The ingress deployment: the HTTP API, which sends each request to the replicas of its backbone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import FastAPI
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from dreambooth.common.location import Location
from dreambooth.store import SubjectStore
from serve import metrics
from serve.api import errors
from serve.api.auth import folder_of
from serve.api.image_files import ImageFiles
from serve.api.routes import ApiConfig, create_api
from serve.catalog.catalog import Catalog
from serve.config import BUSY_RETRY_AFTER, ServeConfig
from serve.request import DrawnImage, GenerationRequest

_TRIES = 3


class Ingress:
    """Serves the HTTP API, and sends each request to the replicas of its backbone."""

    def __init__(self, config: ServeConfig, replicas: dict[str, DeploymentHandle]) -> None:
        """Serve the versions in the store on the backbones of `replicas`, by hash."""
        metrics.label_by_replica()
        self._config, self._replicas = config, replicas

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the HTTP API; called by Ray Serve once in each ingress process."""
        config = self._config
        keys = None if config.without_keys else folder_of(config.store, config.keys)
        store = SubjectStore(config.store)
        images = Location.of(config.images) if config.images else store.root / "images"
        files = ImageFiles(images, 60 * config.image_minutes)
        settings = ApiConfig(keys, files, config.public_url, config.deadline, config.log_prompts)
        return create_api(Catalog(store, self._replicas), self._draw, settings)

    async def _draw(self, backbone: str, request: GenerationRequest) -> AsyncIterator[DrawnImage]:
        sent = set()
        for tries_left in reversed(range(_TRIES)):
            answer = self._replicas[backbone].options(stream=True).draw.remote(request)
            try:
                async for drawn in answer:
                    if (drawn.number, drawn.preview) not in sent:
                        sent.add((drawn.number, drawn.preview))
                        yield drawn
                return
            except (
                asyncio.CancelledError,
                GeneratorExit,
            ):  # the client left or the deadline passed: the replica stops after the current step
                answer.cancel()
                raise
            except BackPressureError:
                raise errors.too_many(
                    "all replicas are busy: come again later", "overloaded", BUSY_RETRY_AFTER
                ) from None
            except RayTaskError as error:
                raise error.cause from None
            except (
                RayActorError,
                ReplicaUnavailableError,
            ):  # seeds are fixed, so another replica draws the same images
                if not tries_left:
                    message = f"{_TRIES} replicas were lost with this request: come again later"
                    raise errors.unavailable(message, "replica_lost", BUSY_RETRY_AFTER) from None
