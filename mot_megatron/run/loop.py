"""The training loop: resume, run steps, log, evaluate, save and stop."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from mot_megatron.checkpoint.agreement import describe_os_error, on_first_rank
from mot_megatron.checkpoint.find import resolve_resume
from mot_megatron.checkpoint.names import checkpoint_directory
from mot_megatron.config import Config
from mot_megatron.data.blend_stream import progress_of_sources
from mot_megatron.data.corpus import DESCRIPTION_FILE, Corpus
from mot_megatron.data.streams import Position
from mot_megatron.errors import CheckpointError, TrainingError, UserError
from mot_megatron.files import write_atomically
from mot_megatron.job.hardware import peak_flops, peak_memory_of_fullest_rank
from mot_megatron.job.outputs import write_line
from mot_megatron.job.processes import Process
from mot_megatron.job.progress_report import ProgressReport
from mot_megatron.job.stop import Stopped, StopRequest
from mot_megatron.model.flops import count_parameters
from mot_megatron.parallel.gather import values_of_all_ranks
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.run.announce import announce, announce_changes, changed_model
from mot_megatron.run.console import Console
from mot_megatron.run.lock import RunLock
from mot_megatron.run.metrics import TensorBoardLog
from mot_megatron.run.outcome import (
    STOP_FILE,
    Outcome,
    StepFile,
    forget_outcome,
    write_outcome,
)
from mot_megatron.run.profile import StepProfiler
from mot_megatron.run.routing_log import RoutingLog, expert_charts
from mot_megatron.run.samples import log_samples
from mot_megatron.run.saving import RunSaver
from mot_megatron.run.spikes import SPIKES_FILE, choose_act, go_back, write_down
from mot_megatron.run.summary import has_summary, mark_stale, write_summary
from mot_megatron.train.initialize import initialize_from_checkpoint
from mot_megatron.train.interval import Interval
from mot_megatron.train.resume import check_frozen, keep_warmup, read_saved_config
from mot_megatron.train.session import Session, build_session
from mot_megatron.train.spikes import SpikeGuard
from mot_megatron.train.state import Progress, restore
from mot_megatron.train.step import (
    HeldOut,
    StepResult,
    evaluate_held_out,
    train_step,
    unchanged,
)


@dataclass
class _Run:
    """A run in progress on this rank."""

    session: Session
    stop: StopRequest
    lock: RunLock
    saver: RunSaver
    console: Console
    log: TensorBoardLog | None
    progress: Progress
    peak_flops: float
    """Peak FLOP/s of all ranks together."""
    logged: bool
    """Whether points and samples of the last step are in the log already."""
    routing: RoutingLog | None
    """Statistics of the routers; None without experts."""
    profiler: StepProfiler
    step_file: StepFile
    """Where the number of steps done is kept."""
    recent: list[StepResult] = field(default_factory=list)
    """Results of the steps since the last report, without those that made no update."""
    position: Position = field(default_factory=dict)
    """Position in the data before the last step."""

    @property
    def config(self) -> Config:
        return self.session.config


def train(
    config: Config,
    corpus: Corpus,
    groups: ProcessGroups,
    progress_report: ProgressReport | None = None,
    stop: StopRequest | None = None,
) -> None:
    """Train to the last step, or until asked to stop. Collective over the world.

    A run resumes from the newest verified checkpoint in its folder.

    Args:
        config: Resolved configuration.
        corpus: The corpus that the configuration names.
        groups: Process groups of this rank.
        progress_report: Receives the current phase of this rank.
        stop: Source of stop requests; absent: the signals that this process receives.

    Raises:
        UserError: An error that the user can fix; checkpoints are untouched.
    """
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        lock = RunLock(config.run_directory)
        new = _NewFolder(config.run_directory)
        if groups.rank == 0 and not config.run_directory.exists():
            stack.push(new)
        on_first_rank(lambda: _hold(lock, stack, stop))
        new.is_ours = True
        try:
            run = _start(config, corpus, groups, progress_report, stop, lock, stack)
        except Stopped:
            reason, launcher_ended = _agree_on_reason(stop)
            if groups.rank == 0:
                write_line(1, f"{_beginning(reason)}asked to stop before the first step")
                outcome = Outcome("stopped", 0, reason, launcher_ended)
                write_outcome(config.run_directory, outcome)
            return
        new.progress = run.progress
        try:
            _train_steps(run)
        except Stopped:
            _leave(run)


@dataclass
class _NewFolder:
    """Removes a new run's folder if a user's error ends the run before its first step is done.

    The folder then holds nothing that the corrected command would not write again.
    """

    directory: Path
    is_ours: bool = False
    """Whether this job has locked the folder."""
    progress: Progress | None = None
    """Progress of the run, once it has started."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        steps = self.progress.steps if self.progress else 0
        saved = checkpoint_directory(self.directory).exists()
        if isinstance(error, UserError) and self.is_ours and steps == 0 and not saved:
            shutil.rmtree(self.directory, ignore_errors=True)


def _hold(lock: RunLock, stack: contextlib.ExitStack, stop: StopRequest) -> None:
    """Lock the run's folder for this job until ``stack`` is closed, on the first rank."""
    lock.acquire(functools.partial(write_line, 1))
    stack.callback(lock.release)
    file = lock.path.with_name(STOP_FILE)
    file.unlink(missing_ok=True)  # a request from before this job
    forget_outcome(lock.path.parent)
    stack.callback(file.unlink, missing_ok=True)
    stop.watch_file(file)


def _start(
    config: Config,
    corpus: Corpus,
    groups: ProcessGroups,
    progress_report: ProgressReport | None,
    stop: StopRequest,
    lock: RunLock,
    stack: contextlib.ExitStack,
) -> _Run:
    """Build the run, or restore it from its newest checkpoint.

    Raises:
        Stopped: A stop was requested meanwhile.
    """
    lock.name_ranks(values_of_all_ranks(Process.of(os.getpid())))
    search = resolve_resume(checkpoint_directory(config.run_directory))
    saved = read_saved_config(search.checkpoint) if search.checkpoint else None
    if saved is not None:
        check_frozen(config, saved)
        config = keep_warmup(config, saved)
    _check_stop(stop, groups)
    session = build_session(config, corpus, groups, progress_report)
    first = session.is_first_rank
    _check_stop(stop, groups)
    progress, origin = Progress(), None
    if search.checkpoint and saved is not None:
        try:
            progress = restore(session, search.checkpoint)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{changed_model(saved, config)}") from error
    elif config.run.initialize_from is not None:
        origin = initialize_from_checkpoint(session)
    _check_stop(stop, groups)
    # A finished run that is started again is evaluated again, but its points are logged already.
    nothing_left = progress.steps >= config.training.train_steps
    finished = nothing_left and has_summary(config.run_directory, progress.steps)
    on_first_rank(lambda: _make_run_directory(config, corpus))
    if not nothing_left:
        on_first_rank(lambda: mark_stale(config.run_directory))
    log = _open_log(session, progress) if first and not finished else None
    if log:
        log.log_text("configuration", config.to_toml(), progress.steps)
    last = config.training.train_steps
    console = stack.enter_context(Console(config.model.loss_units, progress.steps, last, first))
    for line in search.skipped:
        console.say(f"skipped {line}")
    routing = RoutingLog(session.model) if config.model.has_experts else None
    run = _Run(
        session=session,
        stop=stop,
        lock=lock,
        saver=stack.enter_context(
            RunSaver(
                session,
                lock,
                search.damaged,
                progress.steps if search.checkpoint else None,
                console,
                log,
            )
        ),
        console=console,
        log=log,
        progress=progress,
        peak_flops=_peak_flops(session),
        logged=finished,
        routing=routing,
        profiler=StepProfiler(session, config.run_directory, console.say_here),
        step_file=StepFile(config.run_directory if first else None),
    )
    stack.callback(_close, run)
    announce(session, console, search.checkpoint, origin)
    if saved is not None:
        announce_changes(config, saved, progress.steps, console)
    return run


def _close(run: _Run) -> None:
    """Close what the run writes to, after an error too: the last points are not yet on disk."""
    run.profiler.close()  # a run that stops among the traced steps writes what it has
    run.step_file.close()
    if run.log:
        run.log.close()


def _train_steps(run: _Run) -> None:
    last = run.config.training.train_steps
    evaluation_interval = run.config.evaluation.interval_steps
    done = run.progress.steps
    if run.progress.evaluated_steps < done < last and _due(done, evaluation_interval):
        # The run was stopped between a step and its evaluation.
        _evaluate(run)
    while run.progress.steps < last:
        result = _one_step(run)
        if result.problem and _deal_with(run, result) and not result.counts.stop:
            continue
        done = run.progress.steps
        if done % run.config.logging.interval_steps == 0 or done == last:
            _report(run)
        if result.counts.stop and done < last:
            _leave(run)  # before anything else, since the launcher may give the ranks little time
            return
        if _due(done, evaluation_interval) and done < last:
            _evaluate(run)
        if done % run.config.checkpoint.interval_steps == 0 and done < last:
            _save(run)
        if _due(done, run.config.logging.sample_interval_steps) and done < last:
            _sample(run)
    _finish(run)


def _check_stop(stop: StopRequest, groups: ProcessGroups) -> None:
    """Stop all ranks if a stop was requested on any; one all-reduce over the world.

    Raises:
        Stopped: A stop was requested; raised on all ranks.
    """
    asked = torch.tensor(int(stop.requested), device=groups.device)
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    if asked:
        raise Stopped


def _leave(run: _Run) -> None:
    """Save if necessary, and say how to continue."""
    _save(run)
    run.saver.wait()
    done, last = run.progress.steps, run.config.training.train_steps
    purpose = "to continue" if done < last else "to evaluate the trained model"
    reason, launcher_ended = _agree_on_reason(run.stop)
    if run.session.is_first_rank:
        outcome = Outcome("stopped", done, reason, launcher_ended)
        write_outcome(run.config.run_directory, outcome)
    run.console.say(
        f"{_beginning(reason)}asked to stop: saved after step {done}/{last};"
        f" run the same command {purpose}"
    )


def _agree_on_reason(stop: StopRequest) -> tuple[str, bool]:
    """Return why the ranks stop, and whether it is only that a launcher has ended.

    The request may have reached any rank. Collective over the world.
    """
    found = values_of_all_ranks((stop.reason, stop.launcher_ended))
    given = [each for each in found if each[0] is not None]
    asked = [reason for reason, launcher_ended in given if not launcher_ended]
    reasons = asked or [reason for reason, _ in given]
    return str(reasons[0]) if reasons else "", bool(given) and not asked


def _beginning(reason: str) -> str:
    return f"{reason}; " if reason and not reason.startswith("signal") else ""


def _one_step(run: _Run) -> StepResult:
    session, progress = run.session, run.progress
    if run.lock.taken_by:
        run.lock.confirm()
    run.position = session.loader.state_dict()
    guard = SpikeGuard(progress.recent) if run.config.training.on_spike else None
    with run.profiler.around(progress.steps + 1) as add:
        result = train_step(
            session,
            step=progress.steps + 1,
            learning_rate=session.schedule.at(progress.steps),
            # A failed save stops all ranks too; then the wait for it raises its error.
            stop=run.stop.requested or run.saver.has_failed,
            judge=guard.judge if guard else lambda *_: None,
        )
        add(result)
    if result.problem:
        return result
    if guard:
        guard.add(result.total_loss, result.norms.total)
    progress.skipped_in_a_row = 0
    progress.tokens += sum(result.counts.modality_tokens)
    run.recent.append(result)
    _count_step(run, result)
    run.saver.look()
    return result


def _count_step(run: _Run, result: StepResult) -> None:
    progress = run.progress
    progress.steps += 1
    progress.seconds += result.seconds.total
    progress.flops += _flops(run.config, result)
    run.step_file.record(progress.steps)
    run.console.advance()


def _deal_with(run: _Run, result: StepResult) -> bool:
    """Stop, skip or go back because of a step with a problem; return whether the run went back.

    Raises:
        TrainingError: The run stops.
    """
    session, step = run.session, run.progress.steps + 1
    act = choose_act(session, run.progress)
    message = unchanged(step, f"{result.problem}")
    if step == 1 and act.kind == "stop":
        raise TrainingError(message)  # the folder, which holds nothing else, is removed
    if session.is_first_rank:
        write_down(session, act, step, result, run.position)
    file = f"its documents are in {run.config.run_directory / SPIKES_FILE}"
    if act.kind == "stop":
        kept = run.saver.describe_newest()
        raise TrainingError(f"{message}{act.why}; {file}; last good checkpoint: {kept}")
    if act.kind == "skip":
        run.progress.skipped_in_a_row += 1
        _count_step(run, result)
        message = f"{message}, step skipped; {file}"
    else:
        _go_back(run, message)
        message = f"{message}, back to step {run.progress.steps} and past the batch; {file}"
    run.console.say(message)
    if run.log:
        run.log.log_scalars({f"spikes/{act.kind}": result.total_loss}, run.progress.steps)
        run.log.log_text("spikes", message, run.progress.steps)
    return act.kind == "rollback"


def _go_back(run: _Run, problem: str) -> None:
    run.saver.wait()
    run.progress, search = go_back(run.session, run.progress, problem)
    run.recent.clear()
    run.console.go_back(run.progress.steps)
    run.step_file.record(run.progress.steps)
    if run.log:
        run.log.close()
        run.log = _open_log(run.session, run.progress)  # hides the points of the steps undone
    run.saver.went_back(run.progress.steps, search.damaged, run.log)


def _report(run: _Run) -> None:
    if not run.recent:
        return  # all steps since the last report were skipped or undone
    config, progress = run.config, run.progress
    weights = config.model.loss_weights
    interval = Interval.of(run.recent, functools.partial(_flops, config), weights)
    run.recent.clear()
    mfu = interval.flops_per_second / run.peak_flops
    left = interval.seconds.total * (config.training.train_steps - progress.steps)
    memory = peak_memory_of_fullest_rank(run.session.groups.device)
    run.console.interval(progress.steps, interval, mfu, left, memory)
    sources = progress_of_sources(run.session.loader.state_dict())
    run.console.sources(sources)
    if run.log:
        run.log.log_interval(progress.steps, interval, mfu, memory)
        run.log.log_sources(progress.steps, sources)
        run.log.log_scalars(_tower_rates(config, interval.learning_rate), progress.steps)
        run.log.log_progress(progress)
    if run.routing:
        run.routing.report(run.log, progress.steps)
    run.saver.say_if_slow()


def _tower_rates(config: Config, learning_rate: float) -> dict[str, float]:
    """Return the learning rates of the towers that have one of their own, by tag."""
    named = zip(config.model.tower_names, config.model.lr_mults, strict=True)
    return {f"learning_rate/tower_{n}": f * learning_rate for n, f in named if f != 1}


def _flops(config: Config, result: StepResult) -> float:
    """Return the FLOPs of the model in one step, over all ranks."""
    return result.counts.flops(config.model)


def _evaluate(run: _Run, whole: bool = False) -> HeldOut:
    """Evaluate, print and log the losses.

    Args:
        run: The run.
        whole: See ``Session.held_out_batches``.
    """
    session, step = run.session, run.progress.steps
    session.progress_report.enter("evaluation")
    # Log it under another tag, because its loss is not comparable with losses of a part.
    evaluation = run.config.evaluation
    apart = whole and evaluation.max_sequences != evaluation.final_max_sequences
    if apart:
        limit = evaluation.final_max_sequences
        part = "the whole" if limit is None else f"{limit} sequences of the"
        run.console.say(f"evaluating {part} validation split:")
    check_stop = functools.partial(_check_stop, run.stop, session.groups)
    held_out = evaluate_held_out(session, whole, check_stop)
    run.progress.evaluated_steps = step
    run.console.held_out(step, held_out, run.config.model.sees_the_future)
    if run.log:
        run.log.log_progress(run.progress)
        run.log.log_held_out(step, held_out, apart)
    if run.routing:
        run.routing.draw(run.log, step)
    return held_out


def _save(run: _Run) -> None:
    run.session.progress_report.enter("checkpoint")
    run.saver.save(run.progress)


def _sample(run: _Run) -> None:
    run.session.progress_report.enter("samples")
    if run.session.model_is_split:
        run.console.say(
            "no samples: no rank holds the whole model; use mot generate with the checkpoint"
        )
    elif not run.config.model.can_be_causal:
        run.console.say(
            "no samples: the routing of experts sees later tokens; generation needs"
            " model.towers.NAME.experts.causal_router = true"
        )
    elif run.config.model.widths:
        run.console.say("no samples: generation takes models of tokens alone")
    else:
        check_stop = functools.partial(_check_stop, run.stop, run.session.groups)
        log_samples(run.session, run.log, run.progress.steps, check_stop)


def _finish(run: _Run) -> None:
    _save(run)
    evaluation = run.config.evaluation
    limited = evaluation.max_sequences != evaluation.final_max_sequences
    if limited and not run.logged and _due(run.progress.steps, evaluation.interval_steps):
        _evaluate(run)
    # The summary compares these losses with entropies of the whole split.
    held_out = _evaluate(run, whole=True)
    if not run.logged:
        _sample(run)
    run.session.progress_report.enter("checkpoint")
    run.saver.wait()
    parameters = count_parameters(run.config.model).total
    line = on_first_rank(lambda: _write_summary(run, held_out, parameters))
    if run.session.is_first_rank:
        write_outcome(run.config.run_directory, Outcome("done", run.progress.steps))
    run.console.say(line)


def _write_summary(run: _Run, held_out: HeldOut, parameters: int) -> str:
    """Write the summary and return what to print; a full disk must not fail a finished run."""
    try:
        return f"done: {write_summary(run.session, run.progress, held_out, parameters)}"
    except OSError as error:
        return f"done, but the summary cannot be written: {describe_os_error(error)}"


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _open_log(session: Session, progress: Progress) -> TensorBoardLog:
    config = session.config
    return TensorBoardLog(
        config.run_directory / "tensorboard",
        config.model.loss_units,
        config.model.tower_names,
        # Hide points of steps that will be repeated.
        start_step=progress.steps + 1,
        modality_parallel=session.groups.modality_size > 1,
        experts=expert_charts(config.model),
        sources=[source.label for source in config.data.sources],
    )


def _make_run_directory(config: Config, corpus: Corpus) -> None:
    """Create the run's folder with the resolved configuration and the description of the corpus."""
    config.run_directory.mkdir(parents=True, exist_ok=True)
    write_atomically(config.run_directory / "config.toml", config.to_toml())
    # Shows what the run was trained on even if the corpus is not available.
    write_atomically(config.run_directory / DESCRIPTION_FILE, corpus.description_text())


def _peak_flops(session: Session) -> float:
    config = session.config
    device = session.groups.device
    per_rank = config.logging.peak_flops or peak_flops(device, config.training.precision)
    return per_rank * session.groups.mesh.world_size
