"""The policy: a camera frame in, a chunk of velocity commands out.

One tick encodes one new frame and advances the action head's staggered recurrent states by one step; nothing of the window is computed
twice. State lives here and in nothing else: `reset` starts an episode, `step` is the only thing that changes it. Knows nothing about
cameras, clocks or robots.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.errors import BackendError, BundleError, FrameError, JetvlaError, NoEnginesError, NotFiniteError
from bundle.held_files import HeldFiles
from bundle.manifest import MANIFEST_NAME, Manifest
from runtime import golden
from runtime.actions import denormalize
from runtime.backends.base import Backend
from runtime.backends.select import Candidate, PrecisionChoice, candidates, open_backend, view_of
from runtime.instruction import load_embedding, prompt_tensors
from runtime.preprocess import resize

log = logging.getLogger("jetvla")

_OTHER_NAME = "put a new bundle under a name of its own, and rename it when it is whole; then load the policy again."


@dataclass(frozen=True)
class ActionChunk:
    """What one step gives.

    Attributes:
        values: float32 [n, A], commands in the manifest's units; row 0 is for now.
        normalized: float32 [n, A] as the head gives it (tanh; gripper and classes: raw logits).
        feature: float32 [latent * D], the frame's action feature.
        timing: milliseconds per section: preprocess, vision, language, action_head, total.
        engine_ms: of these, inside the engines alone; NaN where it cannot be told.
    """

    values: NDArray[np.float32]
    normalized: NDArray[np.float32]
    feature: NDArray[np.float32]
    timing: dict[str, float]
    engine_ms: float


class Policy:
    """A loaded bundle with the state of one episode. Make one with `Policy.load`; not thread-safe."""

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend, held: HeldFiles | None = None) -> None:
        """Open a bundle on a backend; `held` are its files, open since before they were hashed, or None to trust them."""
        self.manifest = manifest
        self.backend = backend.name
        self.failed_backends: tuple[str, ...] = ()
        """What was tried before this one, and why it could not be used; what is not there does not count."""
        self.passed_over: tuple[str, ...] = ()
        """The same, with what is not there."""
        self._folder = folder.resolve()
        self._held = held
        self._embedding = load_embedding(folder)
        self._chain = backend.open(folder, manifest)
        self.remark = backend.remark
        """What a person should know about how the backend computes this bundle; mostly empty."""
        dims = manifest.dimensions
        self._frames = np.zeros((len(manifest.preprocessing.cameras), dims.image_size, dims.image_size, 3), np.uint8)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: str = "auto",
        *,
        precision: PrecisionChoice = "auto",
        verify: bool = True,
        threads: int = 0,
    ) -> Policy:
        """Load a bundle, check its files, and replay its golden step on the backend.

        Args:
            bundle: directory made by export/build_engines.py.
            backend: `auto`, `trt`, `ort`, `ort:cpu`, `ort:cuda`, `ort:tensorrt`, `ort:tensorrt-rtx`, `ort:openvino` or `fake`.
            precision: `int8` for the bundle's INT8 variant, `float` for what it was exported in; `auto` prefers INT8 where the variant is
                good and the backend gains from it, and runs floating point where INT8 fails.
            verify: hash every file that is used first (seconds for a full-size bundle). Sizes and the manifest are always checked.
            threads: CPU threads; 0 takes all that this process may use.

        Raises:
            BundleError: the bundle is missing, corrupt, of another schema version, or has no INT8 variant though one is asked for.
            BackendError: no backend gave the golden numbers; the message lists why each failed.
        """
        folder = Path(bundle)
        if folder.name == MANIFEST_NAME:
            folder = folder.parent
        folder = folder.resolve()  # the process may change its folder, and a link what it points to
        manifest = Manifest.load(folder)
        plan = candidates(backend, precision, manifest.quantized)
        views = [view_of(manifest, *candidate) for candidate in plan]
        unhashed = manifest.all_stage_files() if verify else frozenset()
        # A report that somebody threw away stops no robot. Anything else that is missing or short is a copy that broke off.
        needed = {name for name in manifest.files if not name.startswith("reports/")}
        manifest.verify_sizes(folder, only=needed)
        held = HeldFiles(_used_files(folder, needed), hint=_OTHER_NAME)
        try:
            if verify:
                manifest.verify(folder, without=unhashed, only=needed)
            return cls._on_first(plan, views, folder, manifest, held, unhashed, threads=threads, verify=verify)
        except BaseException:
            held.close()
            raise

    @classmethod
    def _on_first(
        cls,
        plan: Sequence[Candidate],
        views: Sequence[Manifest],
        folder: Path,
        manifest: Manifest,
        held: HeldFiles,
        unhashed: frozenset[str],
        *,
        threads: int,
        verify: bool,
    ) -> Policy:
        """On the first candidate that gives the golden numbers; `views` are what each makes of the manifest."""
        mixed, alone = len({kind for _, kind in plan}) > 1, len({name for name, _ in plan}) == 1
        reasons: list[str] = []
        failures: list[str] = []
        hint = "pip install 'jetvla[ort]' brings the CPU backend, which runs everywhere."
        for index, (candidate, view) in enumerate(zip(plan, views, strict=True)):
            name, kind = candidate
            label = f"{name} in {kind}" if mixed else name
            rest = plan[index + 1 :]
            policy = None
            try:
                opened = open_backend(name, threads=threads, verify=verify)
                # Only what runs is hashed, and once: the other precision's weights are gigabytes, and engines have hashes of their own.
                wanted = unhashed & view.stage_files() if name != "trt" else frozenset()
                if wanted:
                    manifest.verify(folder, only=wanted)
                    unhashed -= wanted
                policy = cls(folder, view, opened, held)
                if name != "fake":
                    golden.check(policy, folder)
                policy._check_unreplaced()
            except (BackendError, BundleError) as error:
                if policy is not None:
                    policy._chain.close()
                if not _may_go_on(error, candidate, rest) or (alone and not rest):
                    raise
                reasons.append(f"{label}: {error.what} ({error.got})")
                if _is_expected(error, candidate, rest):
                    log.info("backend %s passed over: %s (%s)", label, error.what, error.got)
                else:
                    failures.append(reasons[-1])
                    hint = error.hint
                    log.warning("backend %s skipped: %s (%s); hint: %s", label, error.what, error.got, error.hint)
            else:
                if failures:
                    log.warning("running on %s, because a backend before it failed: %s", label, "; ".join(failures))
                policy.failed_backends = tuple(failures)
                policy.passed_over = tuple(reasons)
                return policy
        raise BackendError(
            f"no backend can run {folder}",
            got="; ".join(reasons),
            hint=hint,
        )

    @property
    def buckets(self) -> tuple[int, ...]:
        """Sequence lengths that the backend can run; the bundle's, or those that have an engine."""
        return self._chain.buckets

    @property
    def window(self) -> int:
        """Frames of history that an action depends on."""
        return self.manifest.dimensions.window

    def reset(
        self,
        instruction: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        attention_mask: Sequence[int] | None = None,
    ) -> None:
        """Start an episode: set the instruction and forget all history.

        Args:
            instruction: text; tokenised as the manifest says.
            token_ids: [L] instead of text, with special tokens, as the tokenizer gives them.
            attention_mask: [L] for `token_ids`; by default everything but the pad token is visible.

        Raises:
            PromptError: neither or both given, cannot be tokenised, or longer than the bundle's buckets.
            BundleError: another bundle has been published in this one's place.
            BackendError: the language graph of another bucket cannot be loaded.
        """
        self._check_unreplaced()
        prompt = prompt_tensors(
            self._folder,
            self.manifest,
            self._embedding,
            self._chain.buckets,
            instruction=instruction,
            token_ids=token_ids,
            attention_mask=attention_mask,
        )
        self._chain.set_prompt(prompt)
        try:
            self._check_unreplaced()  # in the meantime: the decoder of another length would be the other bundle's
        except BundleError:
            self.clear()
            raise

    def _check_unreplaced(self) -> None:
        """Graphs of other buckets, embeddings and tokenizer are read when needed: they must be this bundle's still.

        Raises:
            BundleError: another bundle has been published in its place, or one of its files was replaced or written to.
        """
        if self._held is not None:
            self._held.check(names=True)
        if (
            self.manifest.manifest_sha256
            and Manifest.load(self._folder).manifest_sha256 != self.manifest.manifest_sha256
        ):
            raise BundleError(
                f"{self._folder} was replaced while it was in use",
                expected="the bundle that this policy was loaded from",
                hint="load the policy again; a running episode can go on until its next reset.",
            )

    def clear(self) -> None:
        """Forget instruction and history; the next `step` needs a `reset`."""
        self._chain.clear()

    def close(self) -> None:
        """Release engines and device memory now instead of when the policy is collected; the policy is of no use afterwards."""
        self._chain.close()
        if self._held is not None:
            self._held.close()

    @property
    def image_tokens(self) -> int:
        """Image tokens of all cameras together."""
        return self.manifest.dimensions.image_tokens * len(self.manifest.preprocessing.cameras)

    def step(self, frame: NDArray[np.uint8], *, hand: NDArray[np.uint8] | None = None) -> ActionChunk:
        """Decide on one new observation.

        Args:
            frame: uint8 [H, W, 3] RGB of the static camera, any size.
            hand: the same of the hand camera, for policies that have one.

        Raises:
            PromptError: no `reset` yet.
            FrameError: wrong dtype or shape, or a camera too many or too few.
            BundleError: a file of the bundle was written to, or somebody is about to.
            BackendError: execution failed; the state is unchanged and the step may be tried again.
            NotFiniteError: it gave an action that is not finite; likewise.
        """
        start = time.perf_counter()
        preprocessing = self.manifest.preprocessing
        expects_hand = "hand" in preprocessing.cameras
        if (hand is not None) != expects_hand:
            raise FrameError(
                "the policy has a hand camera" if expects_hand else "the policy has no hand camera",
                got="no hand frame" if expects_hand else "a hand frame",
                hint="pass step(frame, hand=...) exactly for policies trained with use_hand_rgb.",
            )
        views = {"static": frame, "hand": hand}
        for row, camera in zip(self._frames, preprocessing.cameras, strict=True):
            view = views[camera]
            assert view is not None
            row[:] = resize(view, preprocessing, self.manifest.dimensions.image_size)
        chunk = self.step_resized(self._frames, start=start)
        if not (np.isfinite(chunk.normalized).all() and np.isfinite(chunk.values).all()):
            raise NotFiniteError(
                f"{self.backend} gave an action that is not finite",
                got=f"{np.count_nonzero(~np.isfinite(chunk.normalized))} of {chunk.normalized.size} numbers",
                expected="finite numbers",
                hint="stop the robot; run_robot.py BUNDLE --check tells whether the backend computes rightly.",
            )
        return chunk

    def step_resized(self, frames: NDArray[np.uint8], *, start: float | None = None) -> ActionChunk:
        """As `step`, for frames already resized: uint8 [cameras, image_size, image_size, 3], in the manifest's camera order."""
        begin = time.perf_counter()
        if self._held is not None:
            self._held.check()  # before: of a file that was cut off, the first byte read is the end of the process
        tick = self._chain.tick(frames)
        if self._held is not None:
            self._held.check()  # after: what was written meanwhile is in the result
        normalized = tick.action[0].astype(np.float32)
        values = denormalize(normalized, self.manifest.action)
        start = begin if start is None else start
        timing = {
            "preprocess": (begin - start) * 1e3,
            **tick.milliseconds,
            "total": (time.perf_counter() - start) * 1e3,
        }
        return ActionChunk(values, normalized, tick.feature[0].astype(np.float32), timing, tick.engine_ms)

    def run_vision(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Image tokens [1, N, D] of resized frames; a buffer, valid until the next run."""
        return self._chain.run_vision(frames)

    def run_language(self, image_tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """Action feature [1, latent * D] of one frame; a buffer, valid until the next run."""
        return self._chain.run_language(image_tokens)

    def run_action_head(self, feature: NDArray[np.float32]) -> NDArray[np.float32]:
        """Action chunk [1, n, A] as the head gives it; advances the recurrent states unless something is not finite."""
        return self._chain.run_action_head(feature)


def _used_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Everything that a policy may read, engines of any machine included."""
    engines = sorted((folder / "engines").glob("*/*.engine"))
    return [folder / MANIFEST_NAME, *(folder / name for name in sorted(names)), *engines]


def _may_go_on(error: BackendError | BundleError, failed: Candidate, rest: Collection[Candidate]) -> bool:
    """The error is the candidate's own: no lost GPU, and no damaged bundle, unless floating point comes later, which reads other files."""
    if isinstance(error, BundleError):
        return failed[1] == "int8" and any(kind == "float" for _, kind in rest)
    return not getattr(error, "sticky", False)


def _is_expected(error: JetvlaError, failed: Candidate, rest: Collection[Candidate]) -> bool:
    """Nothing is wrong: the backend is not installed, or nobody has built engines of INT8 and those of floating point come next."""
    return getattr(error, "absent", False) or (isinstance(error, NoEnginesError) and (failed[0], "float") in rest)
