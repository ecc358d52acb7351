"""Search, acceptance and measurement: which assignment a bundle gets, and on which backends it was proved.

Drives calib/search.py with real trials on real backends. A backend that fails when it is tried first, or when it judges, is left out under
`--backend auto`, with a warning, and is then not among those that run the variant by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from bundle.errors import BackendError, CalibrationError
from bundle.manifest import Manifest, Measured
from calib.acceptance import Acceptance, Streamed, judge
from calib.assignments import HOPELESS, describe, number, safer, searchable
from calib.config import QuantizeConfig
from calib.data import Data
from calib.rewrite import Integers
from calib.search import Evaluation, Outcome, search
from calib.stage_graph import StageGraph
from calib.trial import Held, Trials, stage_times, stream
from calib.workspace import Workspace
from export.console import Reporter
from runtime.backends.select import FORMS, open_backend
from runtime.policy import Policy

Floats = NDArray[np.float32]
# Steps of each policy when backends are compared, when an assignment is timed, for the record at the end by which the robot chooses, and
# when an assignment with less INT8 than another seems to be faster.
_GLANCE, _ROUNDS, _RECORD, _PROOF = 5, 9, 15, 25
# Safer assignments that are tried when the chosen one fails on the test frames.
_SECOND_CHANCES = 3


def usable_backends(config: QuantizeConfig) -> tuple[list[str], list[str]]:
    """Those that are asked for and work here, and a line for each that does not.

    Raises:
        BackendError: the one that was named does not work.
    """
    usable, left_out = [], []
    for name in FORMS if config.backend == "auto" else (config.backend,):
        try:
            open_backend(name, threads=config.threads)
        except BackendError as error:
            if config.backend != "auto":
                raise
            left_out.append(f"{name} is left out: {error.what}")
        else:
            usable.append(name)
    return usable, left_out


class Selection:
    """What search and acceptance share."""

    def __init__(
        self,
        config: QuantizeConfig,
        manifest: Manifest,
        data: Data,
        workspace: Workspace,
        graphs: Mapping[tuple[str, int | None], StageGraph],
        integers: Mapping[str, Integers],
        backends: Sequence[str],
        reporter: Reporter,
    ) -> None:
        """`backends`: those that can be used; one that fails on the way is taken out."""
        self._config, self._manifest, self._data = config, manifest, data
        self._workspace, self._graphs, self._integers = workspace, graphs, integers
        self._reporter = reporter
        self.backends = list(backends)

    def _trials(self, backend: str) -> Trials:
        return Trials(
            self._workspace.folder, self._manifest, self._graphs, self._integers,
            backend=backend, threads=self._config.threads,
        )  # fmt: skip

    def references(self) -> dict[str, Floats]:
        """Actions of the floating-point policy on all held-out stretches, by name."""
        held = [*self._data.search, *self._data.test]
        known = self._workspace.load_reference()
        if all(each.key in known for each in held):
            return known
        policy = Policy(self._workspace.folder, self._manifest, open_backend("ort:cpu", threads=self._config.threads))
        try:
            with self._reporter.count_bar("floating point", sum(len(each.frames) for each in held)) as advance:
                found = {each.key: stream(policy, each, advance) for each in held}
        finally:
            policy.close()
        self._workspace.save_reference(found)
        return found

    def _leave_out(self, name: str, error: BackendError) -> None:
        """Go on without a backend.

        Raises:
            BackendError: it is the only one, or was asked for.
        """
        if self.backends == [name]:
            raise error
        self._reporter.warn(f"{name} is left out: {error.what} ({error.got})")
        self.backends = [other for other in self.backends if other != name]

    def fastest_backend(self) -> Trials:
        """The backend on which everything in INT8 takes the least time; once found, a run that goes on keeps to it."""
        known = self._workspace.load_fastest()
        if known in self.backends:
            self._reporter.result(f"searching on {known}, as before")
            return self._trials(known)
        policies: dict[str, Policy] = {}
        try:
            for name in self.backends:
                trials = self._trials(name)
                try:
                    policies[name] = trials.policy(frozenset(trials.blocks))
                    stage_times([policies[name]], self._data.search[0], 1)
                except BackendError as error:
                    if name in policies:
                        policies.pop(name).close()
                    self._leave_out(name, error)
            times = stage_times(list(policies.values()), self._data.search[0], _GLANCE)
            totals = {name: sum(each.values()) for name, each in zip(policies, times, strict=True)}
        finally:
            for policy in policies.values():
                policy.close()
        self._reporter.result("all INT8: " + ", ".join(f"{name} {ms:.4g} ms" for name, ms in totals.items()))
        fastest = min(totals, key=lambda name: totals[name])
        self._workspace.save_fastest(fastest)
        return self._trials(fastest)

    def search(self, trials: Trials, references: Mapping[str, Floats]) -> Outcome:
        """Find the fastest assignment within the budget.

        Raises:
            CalibrationError: there is none.
        """
        blocks = searchable(trials.blocks, self._config.keep_float)
        journal = {
            (each.backend, frozenset(each.int8)): each for each in self._workspace.journal(Evaluation)
        }  # fmt: skip
        anchor = trials.policy(frozenset(trials.blocks))
        try:
            base = self._workspace.load_times(trials.backend)
            if base is None:
                base = stage_times([anchor], self._data.search[0], _ROUNDS)[0]
                self._workspace.save_times(trials.backend, base)
            times = base
            with self._reporter.count_bar("assignments", len(blocks) + 1) as advance:

                def try_(chosen: frozenset[str]) -> Evaluation:
                    known = journal.get((trials.backend, chosen))
                    if known is None:
                        known = self._evaluate(trials, chosen, references, anchor, times)
                        self._workspace.append(known)
                    advance()
                    return known

                def retime(each: Evaluation) -> Evaluation:
                    found = self._retimed(trials, each, anchor, times)
                    self._workspace.append(found)
                    return found

                outcome = search(blocks, self._config.max_action_error, try_, retime)
        finally:
            anchor.close()
        for each in outcome.tried:
            self._reporter.result(
                f"{describe(trials.blocks, each)}: action error {each.action_error:.3g}, {each.latency_ms:.4g} ms"
            )
        if outcome.chosen is None:
            best = outcome.best
            if best.action_error >= HOPELESS:
                raise CalibrationError(
                    "no INT8 variant stays within the budget",
                    got="commands that are not finite, whatever is left in floating point",
                    expected="numbers on every held-out frame",
                    hint="more --frames, or --smoothing 0; does the policy itself run on these recordings?",
                )
            raise CalibrationError(
                "no INT8 variant stays within the budget",
                got=f"at best {best.action_error:.3g} ({describe(trials.blocks, best)})",
                expected=f"at most {self._config.max_action_error:g} on held-out frames, searched with a margin of 20 %",
                hint=f"the search would accept it with --max-action-error {best.action_error * 1.35:.2g}; "
                "more --frames, --ranges minmax or smaller --layers-per-block may help. What was computed is kept: another try is quick.",
            )
        return outcome

    def _evaluate(
        self,
        trials: Trials,
        chosen: frozenset[str],
        references: Mapping[str, Floats],
        anchor: Policy,
        base: Mapping[str, float],
    ) -> Evaluation:
        held = self._data.search
        policy = trials.policy(chosen)
        try:
            actions = trials.actions(policy, chosen, held, lambda: None)
            latency = self._latency(trials, chosen, policy, anchor, base, _ROUNDS)
        finally:
            policy.close()
        streams = self._streams(held, references, actions)
        found = judge(streams, self._manifest.action, budget=self._config.max_action_error)
        return Evaluation(trials.backend, tuple(sorted(chosen)), number(found.action_error), latency)

    def _retimed(self, trials: Trials, each: Evaluation, anchor: Policy, base: Mapping[str, float]) -> Evaluation:
        chosen = frozenset(each.int8)
        policy = trials.policy(chosen)
        try:
            latency = self._latency(trials, chosen, policy, anchor, base, _PROOF)
        finally:
            policy.close()
        self._reporter.result(
            f"{describe(trials.blocks, each)}: {latency:.4g} ms when timed again, {each.latency_ms:.4g} at first"
        )
        return structs.replace(each, latency_ms=latency)

    def _latency(
        self,
        trials: Trials,
        chosen: frozenset[str],
        policy: Policy,
        anchor: Policy,
        base: Mapping[str, float],
        rounds: int,
    ) -> float:
        """Milliseconds a step: ratios of stages that took turns with everything in INT8, on one measurement of that."""
        ours, whole = stage_times([policy, anchor], self._data.search[0], rounds)
        differ = trials.stages_of(set(trials.blocks) - chosen)
        return sum(ms * (ours[stage] / whole[stage] if stage in differ else 1.0) for stage, ms in base.items())

    def accept(
        self, trials: Trials, outcome: Outcome, references: Mapping[str, Floats]
    ) -> tuple[Evaluation, dict[str, Acceptance], int]:
        """Judge on the test frames, on every backend; when that fails, the next safer assignments get a chance.

        Returns:
            The assignment, the judgement by backend, and how many assignments were judged.

        Raises:
            CalibrationError: none passed.
        """
        assert outcome.chosen is not None
        chosen: Evaluation | None = outcome.chosen
        judged: list[tuple[Evaluation, Acceptance]] = []
        while chosen is not None:
            found = self._judge_everywhere(trials, chosen, references)
            failed = next((each for each in found.values() if each.verdict == "FAIL"), None)
            if failed is None or self._data.sample is None:  # made-up pictures judge nothing
                return chosen, found, len(judged) + 1
            judged.append((chosen, failed))
            chosen = safer(outcome.tried, judged, _SECOND_CHANCES)
        best, least = min(judged, key=lambda pair: number(pair[1].action_error))
        raise CalibrationError(
            "the INT8 variant does not do the same on test frames",
            got="; ".join(judged[0][1].reasons),
            expected=f"action error at most {self._config.max_action_error:g}, and no changed decisions",
            hint=f"of {len(judged)} assignments that were judged, {describe(trials.blocks, best)} is nearest: {'; '.join(least.reasons)}. "
            "A larger --max-action-error, more --held-out frames to search by, or --keep-float BLOCK.",
        )

    def _judge_everywhere(
        self, trials: Trials, chosen: Evaluation, references: Mapping[str, Floats]
    ) -> dict[str, Acceptance]:
        """The judgement by backend; after a FAIL on recordings no further one is asked."""
        found: dict[str, Acceptance] = {}
        for name in [trials.backend, *(name for name in self.backends if name != trials.backend)]:
            try:
                acceptance = self._judge(name, frozenset(chosen.int8), references)
            except BackendError as error:
                if name == trials.backend:
                    raise
                self._leave_out(name, error)
                continue
            verdict = acceptance.verdict if self._data.sample is not None else "not judged (made-up pictures)"
            self._reporter.result(
                f"{verdict}: {name}, action error {acceptance.action_error:.3g} on {acceptance.frames} test frames"
            )
            for reason in acceptance.reasons:
                self._reporter.warn(reason)
            found[name] = acceptance
            if acceptance.verdict == "FAIL" and self._data.sample is not None:
                break
        return found

    def _judge(self, backend: str, chosen: frozenset[str], references: Mapping[str, Floats]) -> Acceptance:
        held = self._data.test
        policy = self._trials(backend).policy(chosen)
        try:
            with self._reporter.count_bar(
                f"test frames on {backend}", sum(len(each.frames) for each in held)
            ) as advance:
                actions = [stream(policy, each, advance) for each in held]
        finally:
            policy.close()
        streams = self._streams(held, references, actions)
        return judge(streams, self._manifest.action, budget=self._config.max_action_error)

    def measure(self, chosen: Evaluation, acceptances: Mapping[str, Acceptance]) -> tuple[Measured, ...]:
        """A step of every accepted backend and of floating point, in turns; the fastest first."""
        names = list(acceptances)
        policies = [self._trials(name).policy(frozenset(chosen.int8)) for name in names]
        try:
            policies.append(
                Policy(self._workspace.folder, self._manifest, open_backend("ort:cpu", threads=self._config.threads))
            )
            times = [sum(each.values()) for each in stage_times(policies, self._data.test[0], _RECORD)]
        finally:
            for policy in policies:
                policy.close()
        rows = [Measured(backend=name, precision="int8", step_ms=ms) for name, ms in zip(names, times, strict=False)]
        rows.append(Measured(backend="ort:cpu", precision=self._manifest.precision, step_ms=times[-1]))
        for row in sorted(rows, key=lambda each: each.step_ms):
            self._reporter.result(
                f"{row.backend} {row.precision}: {row.step_ms:.4g} ms a step, {row.step_ms / times[-1]:.2f} of floating point"
            )
        if min(times[:-1]) > times[-1]:
            self._reporter.warn(
                "INT8 is not faster than floating point on this machine: auto will run floating point here"
            )
        return tuple(sorted(rows, key=lambda each: each.step_ms))

    @staticmethod
    def _streams(held: Sequence[Held], references: Mapping[str, Floats], actions: Sequence[Floats]) -> list[Streamed]:
        return [
            Streamed(each.episode, each.stretch.start, each.stretch.instruction, references[each.key], found)
            for each, found in zip(held, actions, strict=True)
        ]
