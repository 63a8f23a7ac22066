"""The served models: names and versions, one memory budget, loading and unloading.

`llama@2` is version 2 of `llama`; `llama` is its newest. Start at `ModelStore.load` and `ModelStore.find`.
"""

import asyncio
import dataclasses
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from tinier.checkpoint import Checkpoint, resolve
from tinier.device import free_memory_bytes, pick_device
from tinier.engine import EngineConfig
from tinier.engine.crew import crew_devices
from tinier.engine.drafts import draft_model
from tinier.engine.parallel import Share
from tinier.engine.text import stop_token_ids
from tinier.errors import InputError
from tinier.families import (
    checkpoint_layout,
    geometry_of,
    must_be_merged,
    open_model,
    split_adapter,
)
from tinier.serving.config import Adapters
from tinier.serving.metrics import Metrics
from tinier.serving.model import Engines, Model
from tinier.serving.worker import WorkerSpec
from tinier.tokenizer import check_same_tokens, load_tokenizer

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
# a model's KV cache on a CPU where nothing is said: the memory is shared with all else that runs there
_CPU_CACHE_BYTES = 1 << 30
# what a worker holds beside weights and cache: 385 MB were measured on a CPU, 2.7 GB on a GPU,
# with graphs, activations and the CUDA context
_WORKING_BYTES = {"cpu": 400 << 20, "cuda": 3 << 30}


@dataclass(frozen=True, slots=True)
class Source:
    """A model as it is asked for: `NAME=MODEL`, `NAME@VERSION=MODEL` or MODEL alone."""

    name: str
    version: int | None
    """None: one more than the newest"""
    model: str

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Raises InputError for a name or version that is none."""
        label, separator, model = text.partition("=")
        if not separator:
            model, label = text, Path(text).name
        if not model:
            raise InputError(f"{text!r} names no model. Use NAME=MODEL or MODEL.")
        name, at, version = label.partition("@") if separator else (label, "", "")
        if not _NAME.fullmatch(name):
            raise InputError(f"{name!r} is no name. Use letters, digits and . _ / -")
        if at and not _is_version(version):
            raise InputError(f"{version!r} is no version. Use a number from 1: {name}@2={model}")
        return cls(name, int(version) if at else None, model)


class Member(NamedTuple):
    """One of the models that are asked for together."""

    place: int
    """Among them"""
    model: str
    """As it was asked for"""
    adapter: int = 0
    """Its number in its group, from 1; 0: the base itself"""


class Group(NamedTuple):
    """Models that the same engines serve: one, or several that are adapters of one base."""

    checkpoint: Checkpoint
    adapters: tuple[Path, ...]
    members: list[Member]

    @property
    def model(self) -> str:
        """As the first was asked for."""
        return self.members[0].model

    @property
    def numbers(self) -> dict[Path | None, int]:
        """Of the adapters by their folders, and 0 of the base."""
        return {None: 0} | {folder: i for i, folder in enumerate(self.adapters, 1)}


class Need(NamedTuple):
    """What a model takes."""

    config: EngineConfig
    """Of its engine, without a draft where it is that itself"""
    fixed: int
    """Bytes of weights and work"""
    least: int
    """Bytes of the smallest useful cache, one request's"""
    most: int
    """Of the largest"""


class ModelStore:
    def __init__(
        self, config: EngineConfig, *, replicas: int, max_queue: int, memory_bytes: int | None,
        metrics: Metrics, log_level: int, adapters: Adapters = "auto",
    ) -> None:  # fmt: skip
        """replicas: engines of each model. adapters: as ServeConfig's. memory_bytes: for weights and caches
        of all models, on each GPU; None: what is free now, nine tenths of it on a GPU; half on a CPU, and
        caches of 1 GiB or one request's. Raises InputError where there are too few GPUs, and for a config
        with adapters."""
        if config.adapters:
            raise InputError(
                f"{len(config.adapters)} adapters of no model in EngineConfig. Name models MODEL+ADAPTER."
            )
        self._config = config
        self._max_queue = max_queue
        self._metrics = metrics
        self._log_level = log_level
        device = pick_device(config.device)
        self._device = device
        may_share = adapters == "shared" or (adapters == "auto" and device.type == "cuda")
        self._shares = may_share and config.tensor_parallel == 1
        self._shares_one = adapters == "shared"
        if adapters == "shared" and config.tensor_parallel > 1:
            raise InputError(
                f"tensor_parallel={config.tensor_parallel} with shared adapters. Use merged ones."
            )
        processes = replicas * config.tensor_parallel
        what = f"replicas={replicas}, tensor_parallel={config.tensor_parallel}"
        # each replica's first
        self._devices = crew_devices(processes, device, what)[:: config.tensor_parallel]
        self._is_modest = memory_bytes is None and device.type == "cpu"
        if memory_bytes is None:
            free = free_memory_bytes(device)
            memory_bytes = free * 9 // 10 if device.type == "cuda" else free // 2
        # of one process: on a CPU all of them share it, and have their shares of its cores
        self.memory_bytes = memory_bytes if device.type == "cuda" else memory_bytes // processes
        cores = torch.get_num_threads()
        self._threads = (
            max(1, cores // processes) if device.type == "cpu" and processes > 1 else None
        )
        self._models: dict[tuple[str, int], Model] = {}
        self._reserved: dict[Engines, int] = {}
        self._groups_of_engines: dict[Engines, Group] = {}
        self._loading = asyncio.Lock()

    @property
    def models(self) -> list[Model]:
        """Those that are loaded, or were and failed."""
        return list(self._models.values())

    @property
    def free_bytes(self) -> int:
        return self.memory_bytes - sum(self._reserved.values())

    def find(self, label: str) -> Model | None:
        """`NAME@VERSION`, or `NAME` for its newest version."""
        name, at, version = label.rpartition("@")
        if at and _is_version(version):
            return self._models.get((name, int(version)))
        versions = [v for n, v in self._models if n == label]
        return self._models[label, max(versions)] if versions else None

    async def load_all(self, sources: list[Source]) -> None:
        """Load several models, whose caches share what the weights leave. Those that are adapters of one
        base share its engines. Raises InputError."""
        keys = self._new_keys(sources)
        groups = await asyncio.to_thread(self._groups, sources)
        needs = [await asyncio.to_thread(self._need, group) for group in groups]
        room = self.free_bytes - sum(need.fixed for need in needs)
        caches = [min(need.most, room // len(groups)) for need in needs]
        for group, cache, need in zip(groups, caches, needs, strict=True):
            self._check_room(group.model, need, cache)
        for group, cache, need in zip(groups, caches, needs, strict=True):
            await self._load(group, keys, need, cache)
        # in the order that they were asked for in
        self._models |= {key: self._models.pop(key) for key in keys}

    async def load(self, source: Source) -> Model:
        """Load one more model, or take it from engines that have its adapter. Raises InputError: no such
        model, no room, a version that is there."""
        async with self._loading:
            (key,) = self._new_keys([source])
            found = await asyncio.to_thread(self._engines_with, source.model)
            if found is not None:
                self._add(key, *found)
                return self._models[key]
            (group,) = await asyncio.to_thread(self._groups, [source])
            need = await asyncio.to_thread(self._need, group)
            cache = min(need.most, self.free_bytes - need.fixed)
            self._check_room(group.model, need, cache)
            await self._load(group, [key], need, cache)
            return self._models[key]

    async def unload(self, label: str) -> bool:
        """End a model; what it computes fails. False: there is none of this name."""
        async with self._loading:
            model = self.find(label)
            if model is None:
                return False
            del self._models[model.name, model.version]
            try:
                await model.close()
            finally:
                if not model.engines.models:
                    self._forget(model.engines)
            return True

    async def close(self) -> None:
        await asyncio.gather(*(model.close() for model in self.models))
        self._models.clear()
        self._reserved.clear()
        self._groups_of_engines.clear()

    def _groups(self, sources: list[Source]) -> list[Group]:
        """Which of them share engines."""
        by_base: dict[Path, tuple[Checkpoint, list[Member]]] = {}
        for place, source in enumerate(sources):
            base = open_model(split_adapter(source.model)[0])
            _, members = by_base.setdefault(base.folder.resolve(), (base, []))
            members.append(Member(place, source.model))
        return [group for item in by_base.values() for group in self._groups_of(*item)]

    def _groups_of(self, checkpoint: Checkpoint, members: list[Member]) -> Iterator[Group]:
        """The models of one base: together, but for those whose adapter must be merged."""
        given = {member: split_adapter(member.model)[1] for member in members}
        together: dict[Member, Path | None] = {}
        if self._shares and (len(members) > 1 or self._shares_one) and any(given.values()):
            for member, adapter in given.items():
                folder = resolve(adapter).resolve() if adapter is not None else None
                reason = must_be_merged(folder, checkpoint) if folder is not None else None
                if reason is None:
                    together[member] = folder
                else:
                    log.warning("%s has engines of its own: its adapter %s", member.model, reason)
            folders = [*dict.fromkeys(folder for folder in together.values() if folder)]
            if folders and (len(together) > 1 or self._shares_one):
                group = Group(checkpoint, tuple(folders), [])
                numbered = [m._replace(adapter=group.numbers[f]) for m, f in together.items()]
                yield group._replace(members=numbered)
            else:
                together = {}
        for member in members:
            if member not in together:
                is_base = given[member] is None
                yield Group(checkpoint if is_base else open_model(member.model), (), [member])

    def _forget(self, engines: Engines) -> None:
        self._reserved.pop(engines, None)
        self._groups_of_engines.pop(engines, None)

    def _engines_with(self, model: str) -> tuple[Engines, int] | None:
        """Engines that several share which have this model, and the number of its adapter. None whose
        processes will not come back, or whose files are others by now."""
        shared = [item for item in self._groups_of_engines.items() if item[1].adapters]
        if not shared:
            return None
        base, adapter = split_adapter(model)
        base_folder = open_model(base).folder.resolve()
        folder = resolve(adapter).resolve() if adapter is not None else None
        for engines, group in shared:
            number = group.numbers.get(folder)
            if number is None or group.checkpoint.folder.resolve() != base_folder:
                continue
            if not engines.failed and not _is_newer(group, engines):
                return engines, number
        return None

    def _add(self, key: tuple[str, int], engines: Engines, adapter: int) -> None:
        """One more model of engines that are there."""
        other = next(model for model in self.models if model.engines is engines)
        self._models[key] = Model(
            *key, engines, other.tokenizer, other.stop_token_ids, self._metrics, adapter
        )

    def _need(self, group: Group) -> Need:
        """Raises InputError for a draft with other tokens."""
        checkpoint = group.checkpoint
        config = dataclasses.replace(self._config, adapters=group.adapters)
        draft = draft_model(config)
        if draft is not None and draft.folder.resolve() == checkpoint.folder.resolve():
            # none is its own
            config, draft = dataclasses.replace(config, draft=None), None
        if draft is not None:
            check_same_tokens(checkpoint, draft)
        least = self._request_bytes(checkpoint, draft)
        most = least * self._config.max_batch_size
        if self._is_modest:
            most = min(most, max(least, _CPU_CACHE_BYTES))
        weights = checkpoint.weight_bytes // self._config.tensor_parallel
        weights += draft.weight_bytes if draft is not None else 0
        files = [path for folder in group.adapters for path in folder.glob("*.safetensors")]
        # the second matrices of layers that are one, three at most, lie in a matrix of all their rows
        weights += 3 * sum(path.stat().st_size for path in files)
        return Need(config, weights + _WORKING_BYTES[self._device.type], least, most)

    def _request_bytes(self, checkpoint: Checkpoint, draft: Checkpoint | None) -> int:
        """Of the longest request's cache, in one process, which has all of the draft."""
        positions = self._config.usual_len(geometry_of(checkpoint))
        blocks = -(-positions // self._config.block_size)  # the draft has as many
        own = self._block_bytes(checkpoint) // self._config.tensor_parallel
        return blocks * (own + (self._block_bytes(draft) if draft else 0))

    def _block_bytes(self, checkpoint: Checkpoint) -> int:
        geometry, layout = geometry_of(checkpoint), checkpoint_layout(checkpoint)
        item = 1 if layout and layout.kv_cache else checkpoint.dtype.itemsize
        return geometry.cached_numbers * item * self._config.block_size

    def _check_room(self, model: str, need: Need, cache: int) -> None:
        if cache < need.least:
            raise InputError(
                f"{model} needs {_gib(need.fixed)} and at least {_gib(need.least)} of cache; "
                f"{_gib(self.free_bytes)} of {_gib(self.memory_bytes)} are free. Unload a model, lower "
                "--max-seq-len, or raise --memory."
            )

    async def _load(
        self, group: Group, keys: list[tuple[str, int]], need: Need, cache: int
    ) -> None:
        """keys: names and versions of all that were asked for."""
        checkpoint, config = group.checkpoint, need.config
        Share(0, config.tensor_parallel).geometry(geometry_of(checkpoint))
        if cache < need.least * config.max_batch_size:
            config = dataclasses.replace(config, kv_cache_bytes=cache)
        tokenizer = await asyncio.to_thread(load_tokenizer, checkpoint)
        specs = [
            WorkerSpec(
                folder=checkpoint.folder, config=dataclasses.replace(config, device=device),
                threads=self._threads, log_level=self._log_level,
            )
            for device in self._devices
        ]  # fmt: skip
        name, version = keys[group.members[0].place]
        engines = Engines(f"{name}@{version}", specs, self._max_queue, self._metrics)
        ends = stop_token_ids(checkpoint, tokenizer)
        models = {
            keys[place]: Model(*keys[place], engines, tokenizer, ends, self._metrics, adapter)
            for place, _, adapter in group.members
        }
        self._reserved[engines], self._groups_of_engines[engines] = need.fixed + cache, group
        try:
            await engines.start()
        except BaseException:
            self._forget(engines)
            await engines.close()
            raise
        if engines.ready:  # formats that the device has no arithmetic for were expanded
            loaded = engines.ready.weight_bytes + _WORKING_BYTES[self._device.type]
            self._reserved[engines] = max(need.fixed, loaded) + cache
        self._models |= models

    def _new_keys(self, sources: list[Source]) -> list[tuple[str, int]]:
        """Names and versions, one more than the newest where none is said. Raises InputError for one that
        is there."""
        keys: list[tuple[str, int]] = []
        for source in sources:
            newest = max((v for n, v in (*self._models, *keys) if n == source.name), default=0)
            key = source.name, source.version or newest + 1
            label = f"{key[0]}@{key[1]}"
            if key in keys:
                raise InputError(
                    f"{label} is there twice. Use two versions, such as NAME@1 and NAME@2."
                )
            if key in self._models:
                raise InputError(f"{label} is loaded already. Unload it first.")
            keys.append(key)
        return keys


def _is_newer(group: Group, engines: Engines) -> bool:
    """Whether a file of a group was written since its engines were made."""
    folders = [group.checkpoint.folder, *group.adapters]
    written = [path.stat().st_mtime for folder in folders for path in folder.iterdir()]
    return max(written, default=0.0) > engines.created


def _is_version(text: str) -> bool:
    return text.isdecimal() and len(text) < 11 and 1 <= int(text) < 2**31


def _gib(count: int) -> str:
    return f"{max(0, count) / 2**30:.2f} GiB"
