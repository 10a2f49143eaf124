"""One fine-tuning run from top to bottom: recipe -> rows -> samples -> optimizer steps -> checkpoints -> merge.

    accelerate launch --config_file configs/accelerate/zero3.yaml train.py [RECIPE.yaml] [block.key=value ...]

The same command again continues where the run stopped.
"""

import sys

from launch import preemption

if __name__ == "__main__":
    preemption.end_with_parent()  # before the imports, which take seconds: a launcher may be killed in them, too
    from launch.imports import leave_out_bitsandbytes

    leave_out_bitsandbytes(sys.argv[1:])

import functools
import json
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from launch import batching, layout_files, preflight, runs, worst_case
from launch import checkpoint as checkpoints
from launch import engine as engines
from launch.checkpoint import Resumable
from launch.collectives import joined_in_time, try_network
from launch.config import dump_recipe, intended_run_directory, parse_command_line
from launch.deadline import Deadline
from launch.errors import LaunchError, NoProgressError, OutOfMemoryError, RunInUseError, TrainingError
from launch.findings import Check, collect, settle
from launch.fingerprint import versions
from launch.finish import merge_chosen, use_chosen_step
from launch.job import Job, evaluate, gives_up_step
from launch.machine import Machine, choose_precision, from_text, read_machine, to_text
from launch.machine_findings import checks_of_ranks
from launch.meeting import agree, gather_texts, meet
from launch.merge_rule import DTYPES, choose_dtype
from launch.model import tokenizer_and_template
from launch.modes import keep_private
from launch.movement import Movement
from launch.outlook import look_ahead
from launch.overflow import Overflows
from launch.packing import forward_arguments, probe
from launch.recipe import Recipe
from launch.report import RunLog, Stopwatch, closing_lines, start_up_banner
from launch.room import check_room, find_room
from launch.samples import Samples
from launch.saving import Saves
from launch.start import adapted_base, prepare_run
from launch.trackers import end_trackers, start_trackers
from launch.watchdog import Watchdog


def main(arguments: Sequence[str]) -> int:
    """Run a recipe; a refusal is one sentence from rank zero, and status.json always says what happened."""
    stopwatch = Stopwatch()
    stopwatch.end("imports")
    keep_private(group_readable=False)  # a recipe that does not load leaves a status, too
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the first step there is nothing to save: end quietly
    is_rank_zero = os.environ.get("RANK", "0") == "0"
    directory = intended_run_directory(arguments)
    try:
        recipe = parse_command_line(arguments)
        keep_private(group_readable=recipe.run.group_readable)
        if runs.is_finished(directory, dump_recipe(recipe)):
            if is_rank_zero:
                print(f"{directory} is finished.\n{closing_lines(recipe)}", flush=True)
            return 0
        if os.environ.get("LOCAL_RANK", "0") == "0":
            preflight.remove_stale_build_locks(print)
        with runs.open_run(directory) if is_rank_zero else nullcontext():
            if is_rank_zero:
                newest = runs.newest_step(directory)
                runs.begin(directory, newest, dump_recipe(recipe))
                kept = f"step {newest} is saved" if newest else "there was nothing to save yet"
                word = f"asked to stop before the first step; {kept}"
                preemption.end_when_asked(lambda: runs.leave(directory, "preempted", word))
            train(recipe, stopwatch)
        return 0
    except LaunchError as error:
        if not is_rank_zero:
            preemption.forget_signals()
            is_alone = isinstance(error, OutOfMemoryError)  # rank zero may wait for this rank and never hear of it
            if is_alone:
                runs.write_failure(directory, str(error))
            time.sleep(3 if is_alone else 30)  # rank zero speaks, and the launcher then ends this rank; if not, it does
            print(f"Rank {os.environ['RANK']} ended: {error}", file=sys.stderr, flush=True)
            return 1
        status = runs.read_status(directory)  # maybe another job's, or one that was killed
        is_mine = not isinstance(error, RunInUseError)  # the status is that of another, who may have finished since
        has_trained = is_mine and status.get("state") == "running" and status.get("pid") == os.getpid()
        state: runs.State = "failed" if has_trained or isinstance(error, TrainingError) else "refused"
        if isinstance(error, NoProgressError):
            state = "no progress"
        print(f"{state.capitalize()}: {error}", file=sys.stderr, flush=True)
        if is_mine:
            runs.write_end(directory, state, str(error))
        return 1
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        runs.write_failure(directory, reason, may_go_on=engines.has_lost_a_peer(error))
        raise


def train(recipe: Recipe, stopwatch: Stopwatch) -> None:
    """The line of a run, from the machine to the merged weights."""
    # ---- the machine -------------------------------------------------------------------------------------------------
    engines.quiet_libraries()
    meeting = meet(recipe.run.process_group_timeout_seconds)  # kept: its store may be this process's own
    machine = read_machine()
    machines = [from_text(text) for text in gather_texts(meeting, "machine", to_text(machine))]
    agree(meeting, "start", lambda: settle(collect(checks_of_start(recipe, machines)), print))
    stopwatch.end("checks")
    precision, precision_reason = choose_precision(recipe.train.precision, machine)
    stacks, leave = stacks_file(recipe, meeting.rank), functools.partial(runs.leave_hung, recipe.run_directory)
    with joined_in_time(stacks, leave, rank=meeting.rank):
        accelerator = engines.create_accelerator(recipe, precision)
    stopwatch.end("process group")
    network = try_network(accelerator.device, stacks, leave)
    stopwatch.end("network")

    # ---- rows -> samples, on rank zero -------------------------------------------------------------------------------
    prepare_all = functools.partial(prepare_run, recipe, precision, network, stopwatch)
    found = json.loads(engines.after_rank_zero("prepare", lambda: json.dumps(prepare_all())))
    recipe = preflight.with_revision(recipe, found["revision"])
    tokenizer, template = tokenizer_and_template(recipe, found["base"])
    tokenizer.chat_template = template.for_serving
    samples, held_out = (Samples.load(Path(found["store"]), split) for split in ("train", "evaluation"))
    deepspeed = accelerator.state.deepspeed_plugin.deepspeed_config
    outlook = look_ahead(recipe, found["base"], precision, samples, deepspeed) if accelerator.is_main_process else None
    engines.after_rank_zero("outlook", lambda: settle(outlook.findings if outlook else (), print))
    stopwatch.end("rows")
    checkpoint = Resumable.read(Path(found["checkpoint"])) if found["checkpoint"] else None

    # ---- base model + adapter -> engine ------------------------------------------------------------------------------
    with worst_case.told_while_starting(accelerator.device):
        base, model, engine = made_ready(recipe, found, tokenizer, precision, accelerator, stopwatch)
    virtual = recipe.adapter.num_virtual_tokens
    probed = probe(recipe.train.packing, virtual, engine, base, samples, accelerator.device)
    stopwatch.end("probe")
    job = Job(
        recipe,
        accelerator,
        engine,
        model,
        tokenizer,
        samples,
        held_out,
        packed=probed.packed,
        accepts=forward_arguments(base),
        head=probed.head,
        identity=found["identity"],
        watchdog=watch(recipe),
        deadline=Deadline(recipe.run.grace_seconds),
    )
    largest = worst_case.find_largest(job)
    with worst_case.told(job, largest, "in a trial of the largest micro-batches"):
        worst_case.rehearse(job, largest)
    stopwatch.end("worst case")
    if checkpoint is not None:
        checkpoints.restore(checkpoint, engine)
        job.watchdog.hear()  # a slow disk is no hang
    stopwatch.end("resume")

    # ---- optimizer steps ---------------------------------------------------------------------------------------------
    resumed_after = checkpoint.step if checkpoint else None
    start_trackers(accelerator, recipe, resumed_after)
    stopwatch.end("trackers")
    if outlook is not None:
        job.deadline.recall(runs.read_metrics(recipe.run_directory))
        reasoned = f"{precision}: {precision_reason}"
        banner = start_up_banner(job, reasoned, network, found["rows"], probed, outlook, resumed_after)
        print(banner, flush=True)
        runs.write_status(recipe.run_directory, "running", "training", pid=os.getpid())
    evaluations: list[dict[str, Any]] = found["evaluations"]
    told = worst_case.told(job, largest, "in a micro-batch")
    with ThreadPoolExecutor(1, "checkpoint") as writer, told:  # what is being written ends while the directory is ours
        is_done = optimizer_steps(job, writer, checkpoint, evaluations, stopwatch)
    job.watchdog.close()
    if outlook is not None:
        done = job.total_steps if is_done else runs.read_status(recipe.run_directory).get("step", 0)
        outlook.compare(recipe.run_directory, done, print if is_done else lambda line: None)
    if not is_done:
        end_trackers(accelerator)
        return

    # ---- adapter -> merged weights -----------------------------------------------------------------------------------
    if not accelerator.is_main_process:
        preemption.forget_signals()  # all is saved: what is left can be done again
    else:
        word = "asked to stop while merging; every step is saved"
        preemption.end_when_asked(lambda: runs.leave(recipe.run_directory, "preempted", word))
    chosen = use_chosen_step(job, evaluations)
    if recipe.merges:
        merge_chosen(job, found, base, choose_dtype(recipe.run.merge_dtype, precision), chosen)
        engines.after_rank_zero("merged")
    dist.barrier()  # of ranks that are all here: they leave the process group, and its store, together
    end_trackers(accelerator)
    if accelerator.is_main_process:
        runs.write_status(recipe.run_directory, "finished", "every step is done", step=job.total_steps)
        print(closing_lines(recipe), flush=True)


def checks_of_start(recipe: Recipe, machines: Sequence[Machine]) -> list[Check]:
    """All that can be known before NCCL and the weights; on rank zero, with the machine of each rank."""
    launched, auto_precision = layout_files.layout_of_environment(os.environ), choose_precision("auto", machines[0])[0]
    return [
        *preflight.checks(recipe, of_weights=[lambda: find_room(recipe, is_start=True)]),
        lambda: layout_files.check(recipe, launched, auto_precision),
        *checks_of_ranks(machines, recipe.train.precision),
    ]


def made_ready(
    recipe: Recipe,
    found: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    precision: str,
    accelerator: Accelerator,
    stopwatch: Stopwatch,
) -> tuple[torch.nn.Module, PeftModel, engines.Engine]:
    """(the base, the adapter on it, the engine around both); a collective."""
    base, model = adapted_base(recipe, found, tokenizer, precision)
    if accelerator.is_main_process:
        num_trained, num_parameters = engines.count_parameters(model)
        itemsize = DTYPES[choose_dtype(recipe.run.merge_dtype, precision)].itemsize
        check_room(recipe, num_trained, num_parameters * itemsize)
    stopwatch.end("base")
    engine = engines.start_engine(accelerator, model, recipe.train)
    stopwatch.end("engine")
    return base, model, engine


def watch(recipe: Recipe) -> Watchdog:
    """Ends this rank when it hangs; its stacks go into the run directory's logs."""
    seconds, stacks = recipe.run.hang_seconds, stacks_file(recipe, dist.get_rank())
    return Watchdog(seconds, stacks, lambda reason: runs.leave_hung(recipe.run_directory, reason))


def stacks_file(recipe: Recipe, rank: int) -> Path:
    """Where a rank's stacks are written when it hangs."""
    return recipe.run_directory / "logs" / f"stacks-of-rank-{rank}.txt"


def optimizer_steps(
    job: Job,
    writer: ThreadPoolExecutor,
    checkpoint: Resumable | None,
    evaluations: list[dict[str, Any]],
    stopwatch: Stopwatch,
) -> bool:
    """Every step that is left. False when the run was asked to stop; all is saved either way.

    `evaluations` are those before; what is evaluated is added.
    """
    recipe, settings, engine = job.recipe, job.recipe.train, job.engine
    learning_rate_at = engines.learning_rate_schedule(settings, job.total_steps)
    num_trained = job.samples.num_trained
    first_step = checkpoint.step if checkpoint else 0
    skipped_steps = int(checkpoint.state["skipped_steps"]) if checkpoint else 0
    log = RunLog(
        recipe.run_directory,
        job.accelerator,
        stopwatch,
        total_steps=job.total_steps,
        first_step=first_step,
        logging_steps=settings.logging_steps,
    )

    facts = {"identity": job.identity, "versions": versions()}
    saves = Saves(job, log, writer, evaluations, facts=facts, first_step=first_step)
    overflows, movement = Overflows(engine, log.say), Movement(engine)

    def leave_word() -> None:
        if job.accelerator.is_main_process:
            word = "interrupted twice, so it ended at once; what was saved before stands"
            runs.leave(recipe.run_directory, "preempted", word)

    def stopped_after(done: int) -> bool:
        saves.save(done, skipped_steps=skipped_steps)
        saves.finish()
        log.close()
        if job.accelerator.is_main_process:
            why = "asked to stop" if preemption.stop_requested() or not job.deadline.is_near() else "the job ends soon"
            kept = f"step {done} is saved" if done else "there was nothing to save yet"
            runs.write_status(recipe.run_directory, "preempted", f"{why}; {kept}", step=done)
            log.say(f"Stopped: {kept}. The same command continues from there.")
        dist.barrier()  # all is said before the first launcher ends, for srun then kills those of the other nodes
        return False

    polls = False  # within a step: only where a step and a save may not fit into the time that a stop is given
    preemption.remember_signals(leave_word)
    if not evaluate_if_due(job, log, saves, first_step, skipped_steps):  # 0, or what a stop left out
        return stopped_after(first_step)
    stopwatch.end("evaluation")
    for step in range(first_step, job.total_steps):
        # ==== one optimizer step ======================================================================================
        preemption.end_if_orphaned()
        since = time.monotonic()
        ids = batching.step_samples(
            step, len(job.samples), settings.global_batch_size, job.total_samples, settings.seed
        )
        tokens_in_step = int(num_trained[ids].sum())  # over all ranks, which is known without asking them
        torch.manual_seed(batching.step_seed(settings.seed, step, dist.get_rank()))
        sums = torch.zeros(7, dtype=torch.float64, device=job.accelerator.device)
        micro_batches = job.micro_batches(job.samples, ids)
        for index, micro_batch in enumerate(micro_batches):
            if polls and gives_up_step(job, share_left=1 - index / len(micro_batches)):
                return stopped_after(step)
            loss_sum, micro_sums, num_cells = job.loss(job.samples, micro_batch)
            engines.backward(engine, loss_sum / tokens_in_step, is_last=index == len(micro_batches) - 1)
            sums[:3] += micro_sums
            sums[3] += num_cells
        learning_rate = learning_rate_at(step)
        gradient_norm, skipped = engines.step(engine, learning_rate)
        sums[4], sums[5], sums[6] = job.wants_to_stop(), saves.is_due_by_the_clock(), job.is_tight()
        dist.all_reduce(sums)  # [loss sum, correct, tokens, cells, ranks that want to stop, a save is due, poll]
        # ==============================================================================================================
        done = step + 1
        is_last = done == job.total_steps
        stop, save_is_due, is_tight = (sums[4:] > 0).tolist()
        seconds = time.monotonic() - since
        job.deadline.steps.add(seconds)
        skipped_steps += skipped
        log.step(
            done,
            sums[:4].tolist(),
            int(job.samples.lengths[ids].sum()),
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            skipped_steps=skipped_steps,
            loss_scale=engines.loss_scale(engine),
            seconds=seconds,
            is_last=is_last or stop,
        )
        if is_tight and not polls:
            log.say(job.deadline.warning())
        polls = is_tight
        movement.after_step(gradient_norm=gradient_norm, learning_rate=learning_rate, skipped=skipped)
        overflows.after_step(done, skipped=skipped)
        if overflows.num_in_a_row >= settings.max_bad_steps:
            saves.finish()
            raise TrainingError(f"{overflows.sentence()}{saves.last_good()}.")
        if stop:
            return stopped_after(done)
        if is_last or save_is_due or done % settings.save_steps == 0:
            saves.save(done, skipped_steps=skipped_steps)
        if not evaluate_if_due(job, log, saves, done, skipped_steps):
            return stopped_after(done)
    saves.finish()
    log.close()
    return True


def evaluate_if_due(job: Job, log: RunLog, saves: Saves, done: int, skipped_steps: int) -> bool:
    """False when the run was asked to stop in the meantime; the next start makes up for it.

    The step with the best metric so far is saved, if the recipe wants it.
    """
    settings, evaluations = job.recipe.train, saves.evaluations
    is_due = done in (0, job.total_steps) or (settings.eval_steps and done % settings.eval_steps == 0)
    if not is_due or done <= max((record["step"] for record in evaluations), default=-1):
        return True
    found = evaluate(job)
    if found is None:
        log.left_evaluation(done)
        return False
    counts, seconds = found
    log.evaluation(done, counts, seconds)
    if done == 0 and counts.num_tokens and not math.isfinite(counts.loss):
        raise TrainingError(
            f"The held-out loss is {counts.loss} before anything is trained: the weights of the base are wrong, or "
            f"too large for {job.identity['precision']}; try train.precision=fp32."
        )
    metrics = {"step": done, "loss": counts.loss, "token_accuracy": counts.token_accuracy}
    evaluations.append(runs.finite(metrics))
    if settings.load_best_model_at_end and runs.best_step(evaluations, settings.metric_for_best_model) == done:
        saves.save(done, skipped_steps=skipped_steps)
    return True


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # all is written: torch's threads have been seen to abort the interpreter's own end
