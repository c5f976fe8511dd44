"""The training loop: resume, run steps, log, evaluate, save and stop."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from mot_megatron.checkpoint.agreement import describe_os_error, on_first_rank
from mot_megatron.checkpoint.find import CheckpointInfo, resolve_resume
from mot_megatron.checkpoint.names import checkpoint_directory
from mot_megatron.config import Config
from mot_megatron.config_files import differing_keys
from mot_megatron.data.budget import describe_budgets
from mot_megatron.data.corpus import DESCRIPTION_FILE, Corpus
from mot_megatron.errors import CheckpointError, TrainingError, UserError
from mot_megatron.files import write_atomically
from mot_megatron.job.hardware import peak_flops, peak_memory_of_fullest_rank
from mot_megatron.job.outputs import write_line
from mot_megatron.job.processes import Process
from mot_megatron.job.progress_report import ProgressReport
from mot_megatron.job.stop import Stopped, StopRequest
from mot_megatron.model.flops import count_parameters
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.run.console import Console
from mot_megatron.run.lock import RunLock
from mot_megatron.run.metrics import TensorBoardLog
from mot_megatron.run.profile import StepProfiler
from mot_megatron.run.routing_log import RoutingLog, expert_charts
from mot_megatron.run.samples import log_samples
from mot_megatron.run.summary import has_summary, mark_stale, write_summary
from mot_megatron.train.interval import Interval
from mot_megatron.train.resume import keep_warmup, read_saved_config
from mot_megatron.train.session import Session, build_schedule, build_session
from mot_megatron.train.state import Progress, restore, save
from mot_megatron.train.step import HeldOut, StepResult, evaluate_held_out, train_step

STOP_FILE = "stop"
"""Creating a file of this name in the run's folder requests a stop; the run removes the file."""


@dataclass
class _Run:
    """A run in progress on this rank."""

    session: Session
    stop: StopRequest
    lock: RunLock
    damaged: tuple[Path, ...]
    """Checkpoints that failed verification when the run was resumed."""
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
    saved_steps: int | None = None
    """Steps done at the last save; None before the first."""
    recent: list[StepResult] = field(default_factory=list)
    """Results of the steps since the last report."""

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
            if groups.rank == 0:
                write_line(1, f"{_stop_reason(stop)}asked to stop before the first step")
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
    processes: list[Process] = [Process.of(os.getpid())] * groups.mesh.world_size
    dist.all_gather_object(processes, processes[0])
    lock.name_ranks(processes)
    search = resolve_resume(checkpoint_directory(config.run_directory))
    saved = read_saved_config(search.checkpoint) if search.checkpoint else None
    if saved is not None:
        config = keep_warmup(config, saved)
    _check_stop(stop, groups)
    session = build_session(config, corpus, groups, progress_report)
    first = session.is_first_rank
    _check_stop(stop, groups)
    progress = Progress()
    if search.checkpoint and saved is not None:
        try:
            progress = restore(session, search.checkpoint)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_changed_model(saved, config)}") from error
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
        # Close it after an error too, since the last points are not yet on disk.
        stack.enter_context(contextlib.closing(log))
    modalities = list(config.model.modalities)
    last = config.training.train_steps
    console = stack.enter_context(Console(modalities, progress.steps, last, first))
    for line in search.skipped:
        console.say(f"skipped {line}")
    routing = RoutingLog(session.model) if config.model.has_experts else None
    run = _Run(
        session=session,
        stop=stop,
        lock=lock,
        damaged=search.damaged,
        console=console,
        log=log,
        progress=progress,
        peak_flops=_peak_flops(session),
        logged=finished,
        routing=routing,
        profiler=StepProfiler(session, config.run_directory, console.say_here),
    )
    # A run that stops among the traced steps writes what it has.
    stack.callback(run.profiler.close)
    _announce(run, search.checkpoint)
    if saved is not None:
        _announce_changes(run, saved)
    return run


def _train_steps(run: _Run) -> None:
    last = run.config.training.train_steps
    evaluation_interval = run.config.evaluation.interval_steps
    done = run.progress.steps
    if run.progress.evaluated_steps < done < last and _due(done, evaluation_interval):
        # The run was stopped between a step and its evaluation.
        _evaluate(run)
    while run.progress.steps < last:
        result = _one_step(run)
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
    done, last = run.progress.steps, run.config.training.train_steps
    purpose = "to continue" if done < last else "to evaluate the trained model"
    run.console.say(
        f"{_stop_reason(run.stop)}asked to stop: saved after step {done}/{last};"
        f" run the same command {purpose}"
    )


def _stop_reason(stop: StopRequest) -> str:
    return f"{stop.reason}; " if stop.reason and not stop.reason.startswith("signal") else ""


def _one_step(run: _Run) -> StepResult:
    session, progress = run.session, run.progress
    if run.lock.taken_by:
        raise TrainingError(
            f"{run.config.run_directory}: another job ({run.lock.taken_by}) took over this folder"
            " while this job was suspended; this job ends without saving"
        )
    try:
        with run.profiler.around(progress.steps + 1) as add:
            result = train_step(
                session,
                step=progress.steps + 1,
                learning_rate=session.schedule.at(progress.steps),
                stop=run.stop.requested,
            )
            add(result)
    except TrainingError as error:
        kept = "none was saved yet"
        if run.saved_steps is not None:
            kept = f"step {run.saved_steps}"
        raise TrainingError(f"{error}; last good checkpoint: {kept}") from error
    progress.steps += 1
    progress.seconds += result.seconds.total
    progress.tokens += sum(result.counts.modality_tokens)
    progress.flops += _flops(run.config, result)
    run.recent.append(result)
    run.console.advance()
    return result


def _report(run: _Run) -> None:
    config, progress = run.config, run.progress
    weights = config.model.loss_weights
    interval = Interval.of(run.recent, functools.partial(_flops, config), weights)
    run.recent.clear()
    mfu = interval.flops_per_second / run.peak_flops
    left = interval.seconds.total * (config.training.train_steps - progress.steps)
    memory = peak_memory_of_fullest_rank(run.session.groups.device)
    run.console.interval(progress.steps, interval, mfu, left, memory)
    if run.log:
        run.log.log_interval(progress.steps, interval, mfu, memory)
        run.log.log_progress(progress)
    if run.routing:
        run.routing.report(run.log, progress.steps)


def _flops(config: Config, result: StepResult) -> float:
    """Return the FLOPs of the model in one step, over all ranks."""
    return result.counts.flops(config.model)


def _evaluate(run: _Run, whole: bool = False) -> HeldOut:
    """Evaluate, print and log the losses.

    Args:
        run: The run.
        whole: Use the whole split, even if evaluation.max_sequences limits it.
    """
    session, step = run.session, run.progress.steps
    session.progress_report.enter("evaluation")
    # Log it under another tag, because its loss is not comparable with losses of a part.
    apart = whole and run.config.evaluation.max_sequences is not None
    if apart:
        run.console.say("evaluating the whole validation split:")
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
    if run.saved_steps != run.progress.steps:
        run.session.progress_report.enter("checkpoint")
        save(run.session, run.progress, run.damaged)
        run.saved_steps = run.progress.steps


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
    else:
        check_stop = functools.partial(_check_stop, run.stop, run.session.groups)
        log_samples(run.session, run.log, run.progress.steps, check_stop)


def _finish(run: _Run) -> None:
    _save(run)
    evaluation = run.config.evaluation
    limited = evaluation.max_sequences is not None
    if limited and not run.logged and _due(run.progress.steps, evaluation.interval_steps):
        _evaluate(run)
    # The summary compares these losses with entropies of the whole split.
    held_out = _evaluate(run, whole=True)
    if not run.logged:
        _sample(run)
    parameters = count_parameters(run.config.model).total
    line = on_first_rank(lambda: _write_summary(run, held_out, parameters))
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
        list(config.model.modalities),
        config.model.tower_names,
        # Hide points of steps that will be repeated.
        start_step=progress.steps + 1,
        modality_parallel=session.groups.modality_size > 1,
        experts=expert_charts(config.model),
    )


def _make_run_directory(config: Config, corpus: Corpus) -> None:
    """Create the run's folder with the resolved configuration and the description of the corpus."""
    config.run_directory.mkdir(parents=True, exist_ok=True)
    write_atomically(config.run_directory / "config.toml", config.to_toml())
    # Shows what the run was trained on even if the corpus is not available.
    description = (corpus.directory / DESCRIPTION_FILE).read_bytes()
    write_atomically(config.run_directory / DESCRIPTION_FILE, description)


def _peak_flops(session: Session) -> float:
    config = session.config
    device = session.groups.device
    per_rank = config.logging.peak_flops or peak_flops(device, config.training.precision)
    return per_rank * session.groups.mesh.world_size


def _announce(run: _Run, resumed: CheckpointInfo | None) -> None:
    session, config = run.session, run.config
    groups = session.groups
    count = count_parameters(config.model)
    towers = ", ".join(
        f"{name} {tower / 1e6:.2f} M"
        for name, tower in zip(config.model.tower_names, count.towers, strict=True)
    )
    run.console.say(
        f"{config.run.name}: {count.total / 1e6:.2f} M parameters"
        f" (shared {count.shared / 1e6:.2f} M, {towers})"
    )
    run.console.say(
        f"{groups.mesh.world_size} x {groups.device.type}: {_describe_axes(config, groups)},"
        f" ZeRO-{config.parallel.zero_stage};"
        f" {config.accumulation_steps(groups.data_size)} micro-batches of"
        f" {config.training.micro_batch_size} x {config.data.seq_length} tokens per step and"
        f" {'rank' if config.parallel.attention_exchange == 'sequence' else 'modality group'}"
    )
    run.console.say(
        f"corpus {session.corpus.description.name}: {100 * session.loader.fill:.1f}% of the token"
        " slots filled; losses are in bits per token"
    )
    if session.loader.budgets is not None:
        towers, fill = config.model.tower_names, session.loader.fill
        run.console.say(describe_budgets(session.loader.budgets, towers, fill))
    if resumed:
        run.saved_steps = run.progress.steps
        run.console.say(f"continuing from {resumed.path}")


def _changed_model(saved: Config, config: Config) -> str:
    """Return a suffix for the error of a failed restore: the changed keys of the model, if any."""
    changes = differing_keys(saved.model_dump(mode="json"), config.model_dump(mode="json"))
    model = [
        f"{key} was {_or_absent(old)} and is {_or_absent(new)}"
        for key, (old, new) in changes.items()
        if key.startswith("model.")
    ]
    return f" ({'; '.join(model)})" if model else ""


def _announce_changes(run: _Run, saved: Config) -> None:
    """Print how the configuration differs from that of the checkpoint."""
    config, done = run.config, run.progress.steps
    before, now = tomllib.loads(saved.to_toml()), tomllib.loads(config.to_toml())
    for key, (old, new) in differing_keys(before, now).items():
        run.console.say(f"  with {key} = {_or_absent(new)}, which was {_or_absent(old)}")
    last = config.training.train_steps
    if done >= last:
        run.console.say(
            f"nothing is left to train: {done} steps are done, and training.train_steps = {last};"
            " evaluating again"
        )
        return
    rates = [build_schedule(one).at(done) for one in (saved, config)]
    if not math.isclose(*rates, rel_tol=1e-3):
        run.console.say(
            f"  the learning rate of step {done + 1} is {rates[1]:.2e}; with the configuration of"
            f" the checkpoint it would be {rates[0]:.2e}"
        )


def _or_absent(value: object) -> str:
    return "absent" if value is None else f"{value!r}"


def _describe_axes(config: Config, groups: ProcessGroups) -> str:
    """Describe the parallel axes of size 2 or more, fastest first."""
    pieces = config.parallel.virtual_pipeline_model_parallel_size
    axes = {
        "tensor parallel": groups.tensor_size,
        "modality parallel": groups.modality_size,
        "data parallel": groups.data_size // groups.modality_size,
        "pipeline stages": groups.pipeline_size,
    }
    named = [f"{name} {size}" for name, size in axes.items() if size > 1]
    if pieces is not None:
        named[-1] += f" of {pieces} pieces"
    return ", ".join(named) or "no parallelism"
