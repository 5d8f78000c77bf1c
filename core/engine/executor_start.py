"""Constructs the executor of an engine core, and lets steps be counted on their way to it where that was asked for."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from quire.core.config import EngineConfig
from quire.core.contracts.executor import Executor
from quire.core.engine.args import EngineArgs
from quire.core.errors import ConfigError
from quire.core.messages import SchedulerOutput
from quire.core.plugin.target import construct_chosen, load_target
from quire.core.worker.multiproc.executor import MultiprocExecutor
from quire.core.worker.multiproc.rank_launch import MAX_EARLY_RANKS
from quire.core.worker.multiproc.rank_processes import RankProcesses

__all__ = ["make_executor", "start_ranks_early"]


def start_ranks_early(args: EngineArgs) -> RankProcesses | None:
    """The processes of the ranks, before more is known than their number: to be given to ``make_executor``, or killed.
    None where there is one rank, or an executor of which it is not known that it has a use for them."""
    if not 1 < args.num_workers <= MAX_EARLY_RANKS or args.executor not in ("auto", "multiproc"):
        return None
    with contextlib.suppress(ConfigError):  # it comes again when the executor starts, and is reported
        return RankProcesses(args.num_workers, args.device)
    return None


def make_executor(config: EngineConfig, processes: RankProcesses | None = None) -> Executor:
    """The executor that ``config`` names, not yet started. With ``capture_shapes`` its methods that run a step are
    wrapped; without it they are the plugin's own. ``processes`` were started while the configuration was built: an
    executor that has no use for them ends them."""
    choice = config.plugin("executor")
    executor_class = load_target(choice.target, "quire.core.contracts.executor:Executor")
    executor: Executor = construct_chosen(choice, executor_class, config)
    if processes is not None:
        if isinstance(executor, MultiprocExecutor) and processes.size == config.parallel.num_workers:
            executor.use_processes(processes)
        else:
            processes.kill()
    if config.capture_shapes is not None:
        _count_shapes(executor, config.capture_shapes)
    return executor


def _count_shapes(executor: Any, path: str) -> None:
    from quire.core.traces.step_shapes import ShapeRecorder

    recorder = ShapeRecorder(Path(path))
    run_step, run_model, shutdown = executor.execute_step, executor.execute_model, executor.shutdown

    def execute_step(step: SchedulerOutput) -> Any:
        recorder.record_step(step)
        return run_step(step)

    def execute_model(step: SchedulerOutput) -> Any:
        recorder.record_step(step)
        return run_model(step)

    def shut_down() -> None:
        shutdown()
        recorder.close()

    executor.execute_step, executor.execute_model, executor.shutdown = execute_step, execute_model, shut_down
