"""`distill compress`: from a model, rows and limits to a picked folder, by successive halving within a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distill.common.console import log, remark
from distill.common.distributed import process_state
from distill.common.folders import locked, write_atomically
from distill.common.records import Pick, Report, StepRecord, read_step
from distill.errors import InputError, TrainingDiverged
from distill.evaluation.fidelity import halves
from distill.experiments.asked import Asked
from distill.experiments.candidates import (
    Candidate,
    Shape,
    Steps,
    candidates_of,
    cost,
    final_step,
    fitting,
    promising,
    shapes_of,
    spread,
    steps_of_shape,
    trained_name,
)
from distill.experiments.choice import Scored, choose, least_retention
from distill.experiments.footprint import Footprint, footprint_of
from distill.experiments.reason import Compared, nothing_fits, nothing_retains, reason_of
from distill.experiments.trials import linked
from distill.experiments.workplace import Round, Workplace, begun
from distill.models.structure import depth_of
from distill.recipes.plan import Plan, make_plan
from distill.recipes.recipe import load_recipe
from distill.recipes.yaml12 import dump_yaml
from distill.reports.report import write_report
from distill.verbs.prune import PrunePlan
from distill.verbs.trim_vocabulary import TrimPlan

PICK = "pick"
"""In the output folder: the picked model, ready to serve."""
COVERAGE = 0.99
"""Share of the rows' tokens that a trimmed vocabulary keeps."""
MARGIN = 0.05
"""Share of `max_ms` that is left for the clock, which tells another time each time."""
_MOST_SHAPES = 8
_LEAST_STEPS, _MOST_FIRST_STEPS = 10, 200
_SHARES = {"teacher": 1 / 3, "shapes": 1 / 4, "first": 1 / 3, "formats": 1 / 4}
"""Of the time: fine-tuning; looking at shapes; of what is left then, the first trainings; the formats at the end."""
_MOST_EPOCHS = 10
_FEWEST_ROWS = 20
_ALL_DIVERGED = "Nothing was picked: the loss of every training became not finite; look at the rows and the model."


@dataclass(frozen=True)
class Compressed:
    """How a compression ended."""

    picked: bool
    said: str
    """Why this model, or why none."""
    report: Report | None = None


def compress(asked: Asked) -> Compressed:
    """Make a model smaller within limits and a time, and write the picked one with its recipe and report.

    One that was cut off goes on where it was, with the time that was left.

    Args:
        asked: the model, rows, limits, engine and time.

    Raises:
        InputError: a model or rows that can't be, or a folder that holds another compression.
    """
    if process_state().num_processes > 1:
        raise InputError("compress: runs in one process; start it without accelerate launch")
    with locked(asked.output_dir):
        work = begun(asked)
        whole = _checked(work)
        teacher = _have_teacher(work, whole)
        footprints = _measured_ahead(work)
        fit = fitting(footprints, work.limits, MARGIN)
        if not fit:
            return Compressed(False, nothing_fits(footprints, work.limits, MARGIN))
        shapes = _train(work, [work.candidates[name] for name in fit], footprints)
        scored = _with_formats(work, shapes, fit, footprints)
        return _picked(work, teacher, scored, {name: footprints[name] for name in work.state.made})


# --- what there is --------------------------------------------------------------------------------------------------


def _checked(work: Workplace) -> Plan:
    """The plan of the teacher with one student, with all that is wrong with model and rows told."""
    work.find_teacher()
    student = {"student": {"run": "distill", "teacher": work.teacher, "max_steps": 1}}
    plan = work.plan(student, rehearsed=True)
    if not plan.data.task.label:
        raise InputError(f"compress: is for tasks with labels, and {plan.data.task.kind} has none")
    rows = len(plan.data.splits[plan.data.task.validation_splits[0][0]])
    if rows < _FEWEST_ROWS:
        raise InputError(
            f"data: {rows} validation rows are too few to choose by one half and to state the metric of the other; "
            f"{_FEWEST_ROWS} are enough"
        )
    return plan


def _have_teacher(work: Workplace, plan: Plan) -> Compared:
    """Fine-tune the model where it has no head, score it, and measure it."""
    if work.finetunes:
        if work.state.teacher_steps is None:
            work.state.teacher_steps = work.affordable_steps(plan, work.teacher, _SHARES["teacher"])
            work.save()
        plan = work.plan({})
        work.run(plan, work.teacher)
    predictions = work.predictions(plan, work.teacher)
    work.score(Shape(), predictions)
    footprint = work.footprint(plan, work.teacher, timed=True)
    return Compared(work.asked.model, predictions, footprint)


def _grid(work: Workplace) -> list[Shape]:
    """The shapes that the model can have; what can't be cut is left out, and said."""
    plan, teacher, student = None, work.teacher, {"run": "distill", "teacher": work.teacher, "max_steps": 1}
    layers, neurons, tokens = 1, None, None
    try:
        plan = work.plan({"student": {**student, "num_layers": 1}})
        layers = depth_of(plan.steps["student"].plan.source.config)
    except InputError as error:
        _leave_out("fewer layers", error)
    try:
        plan = work.plan({"pruned": {"run": "prune", "model": teacher, "neurons": 0.5}})
        pruned = plan.steps["pruned"].plan
        neurons = pruned.sizes.neurons[0] if isinstance(pruned, PrunePlan) and pruned.sizes else None
    except InputError as error:
        _leave_out("fewer neurons", error)
    try:
        trimmed: dict[str, Any] = {"run": "trim_vocabulary", "model": teacher, "coverage": COVERAGE}
        plan = work.plan({"trimmed": trimmed, "student": {**student, "model": "trimmed"}})
        trimming = plan.steps["trimmed"].plan
        if isinstance(trimming, TrimPlan) and len(trimming.kept) < 0.9 * trimming.vocab_size_before:
            tokens = len(trimming.kept)
    except InputError as error:
        _leave_out("a smaller vocabulary", error)
    return shapes_of(layers, intermediate_size=neurons, vocab_size=tokens)


def _leave_out(what: str, error: InputError) -> None:
    log.print(remark(f"{what}: not tried; {error.problems[0]}"))


def _measured_ahead(work: Workplace) -> dict[str, Footprint]:
    """What each candidate takes, from untrained models of their shapes; those that can't be are left out."""
    state = work.state
    if state.shapes is None:
        state.shapes = [asdict(shape) for shape in _grid(work)]
        work.save()
    shapes = [Shape(**each) for each in state.shapes]
    engines = [engine for engine in work.asked.engines if _takes(work, engine)]
    found = candidates_of(shapes, engines)
    work.candidates = {each.name: each for each in found}
    if state.ahead is None:
        steps: Steps = {}
        for shape in shapes:
            steps |= steps_of_shape(shape, work.teacher, [1])
        for each in found:
            steps |= final_step(each, work.teacher, 1)[1]
        plan = work.plan(steps)
        ahead: dict[str, Footprint] = {}
        until = work.left() * (1 - _SHARES["shapes"])
        for each in _in_turns(found):
            if ahead and work.left() < until and fitting(ahead, work.limits, MARGIN):
                log.print(remark(f"{len(found) - len(ahead)} candidates were not looked at, for want of time"))
                break
            try:
                footprint = footprint_of(plan, final_step(each, work.teacher, 1)[0], work.cache, timed=True)
            except InputError as error:
                _leave_out(each.name, error)
                continue
            if footprint is not None:
                ahead[each.name] = footprint
        state.ahead = {name: asdict(each) for name, each in ahead.items()}
        work.save()
        fit = fitting(ahead, work.limits, MARGIN)
        work.say(f"{len(fit)} of {len(ahead)} candidates fit the limits")
    return {name: Footprint(**each) for name, each in state.ahead.items()}


def _takes(work: Workplace, engine: str) -> bool:
    """Whether an engine takes models of this architecture; an `InputError` where the user named it."""
    if engine == "torch":
        return True
    try:
        work.plan({"exported": {"run": "export", "model": work.teacher, "engine": engine, "format": "int8"}})
    except InputError as error:
        if work.asked.engine == engine:
            raise
        _leave_out(engine, error)
        return False
    return True


def _in_turns(found: Sequence[Candidate]) -> list[Candidate]:
    """Candidates in an order whose beginning has seen all of the grid: some shapes of each cost, then the others."""
    shapes = list(dict.fromkeys(each.shape for each in found))
    first = [shapes[0], shapes[-1], *spread(shapes, len(shapes) // 2)]
    order = list(dict.fromkeys([*first, *shapes]))
    return sorted(found, key=lambda each: order.index(each.shape))


# --- successive halving ---------------------------------------------------------------------------------------------


def _train(work: Workplace, fit: Sequence[Candidate], footprints: dict[str, Footprint]) -> list[Shape]:
    """Train the promising shapes briefly, and the better half of them on, again and again; the best shape comes first.

    The whole model, which needs no training, comes where it belongs.
    """
    cheapest: dict[Shape, Footprint] = {}
    for each in fit:
        if each.shape not in cheapest or cost(footprints[each.name]) < cost(cheapest[each.shape]):
            cheapest[each.shape] = footprints[each.name]
    chosen = promising([shape for shape in cheapest if not shape.is_whole], cheapest, _MOST_SHAPES)
    rounds = work.state.rounds
    if chosen and not rounds:
        most = min(_MOST_FIRST_STEPS, _MOST_EPOCHS * work.steps_an_epoch)
        first = int(min(max(work.asked.budget / 6, _LEAST_STEPS), most))
        work.add_round(Round(first, [asdict(chosen[0])]))
    number = 0
    while number < len(work.state.rounds):
        shapes = work.state.rounds[number].parsed()
        steps: Steps = {}
        for shape in shapes:
            steps |= steps_of_shape(shape, work.teacher, work.lengths(shape, number + 1))
        plan = work.plan(steps)
        for shape in shapes:
            _train_once(work, plan, shape, number)
        number += 1
        if number == len(work.state.rounds):
            following = _next_round(work, chosen)
            if following is not None:
                work.add_round(following)
    return work.ranked(shape for shape in [*chosen, Shape()] if shape in cheapest)


def _train_once(work: Workplace, plan: Plan, shape: Shape, number: int) -> None:
    """A shape's training of one round, and its score."""
    lengths = work.lengths(shape, number + 1)
    name = trained_name(shape, len(lengths))
    try:
        work.run(plan, *work.teacher_steps(), *steps_of_shape(shape, work.teacher, lengths))
    except TrainingDiverged as error:
        log.print(remark(f"{name}: given up; {error}"))
        work.values.pop(shape, None)
        return
    work.score(shape, work.predictions(plan, name))
    work.say(f"{name}, {lengths[-1]} steps: {work.metric} {work.values[shape]:.4f}")


def _next_round(work: Workplace, chosen: Sequence[Shape]) -> Round | None:
    """Which shapes go on, and for how many steps; None where no time or nothing is left to be won."""
    rounds = work.state.rounds
    begin, seconds = rounds[0].steps, {shape: work.seconds_of(shape) for shape in chosen}
    known = {shape: each for shape, each in seconds.items() if each is not None}
    if len(rounds) == 1:  # one shape has shown what a training takes
        took = max((around + begin * a_step for around, a_step in known.values()), default=1.0)
        count = int(_SHARES["first"] * work.left() / max(took, 1e-3))
        others = spread(chosen[1:], min(count, len(chosen) - 1)) if count > 0 else []
        if others:
            return Round(begin, [asdict(shape) for shape in others])
    first = rounds[0].parsed() if len(rounds) == 2 and rounds[1].steps == begin else []
    ranked = work.ranked(dict.fromkeys([*rounds[-1].parsed(), *first]))
    alive = ranked[: math.ceil(len(ranked) / 2)]
    if not alive or (len(ranked) == 1 and len(work.lengths(ranked[0])) > 1):
        return None
    left = (1 - _SHARES["formats"]) * work.asked.budget - work.spent()
    share = left / max(1, math.ceil(math.log2(len(ranked))))
    around = sum(known[shape][0] for shape in alive)
    steps = int((share - around) / max(sum(known[shape][1] for shape in alive), 1e-6))
    steps = min(steps, _MOST_EPOCHS * work.steps_an_epoch)
    return Round(steps, [asdict(shape) for shape in alive]) if steps >= begin else None


# --- formats and the pick -------------------------------------------------------------------------------------------


def _with_formats(
    work: Workplace, shapes: Sequence[Shape], fit: Sequence[str], footprints: dict[str, Footprint]
) -> list[tuple[Candidate, Scored]]:
    """The candidates of trained shapes that fit, made and scored, the best shape's first, as far as time allows."""
    found = []
    state = work.state
    todo = [work.candidates[name] for shape in shapes for name in fit if work.candidates[name].shape == shape]
    steps: Steps = {}
    for each in todo:
        lengths = work.lengths(each.shape)
        steps |= {
            **steps_of_shape(each.shape, work.teacher, lengths),
            **final_step(each, work.teacher, len(lengths))[1],
        }
    if not todo:
        return []
    plan = work.plan(steps)
    for each in todo:
        if each.name not in state.made and (state.done or (state.made and work.left() <= 0)):
            continue
        name, _ = final_step(each, work.teacher, len(work.lengths(each.shape)))
        if name in plan.steps:
            work.run(plan, name)
        again = each.format.endswith("-int8")  # of an export, which may keep layers in float
        after = work.footprint(plan, name, timed=again)
        footprint = Footprint(after.mb, after.ms if again else footprints[each.name].ms)
        if each.name not in state.made:
            state.made.append(each.name)
            work.save()
        if fitting({each.name: footprint}, work.limits, MARGIN):
            found.append((each, Scored(name, work.predictions(plan, name), footprint)))
            work.say(f"{name}: {footprint.mb:.2f} MB, {footprint.ms:.1f} ms")
        else:
            footprints[each.name] = footprint
    state.done = True
    work.save()
    return found


def _picked(
    work: Workplace,
    teacher: Compared,
    found: Sequence[tuple[Candidate, Scored]],
    made: Mapping[str, Footprint],
) -> Compressed:
    """Choose by one half of the rows, state the metric of the other, and write what there is to serve."""
    data, task, limits = work.data, work.data.task, work.limits
    labels = data.labels(task.validation_splits[0][0])
    choosing, stating = halves(len(teacher.predictions))
    if not found:
        return Compressed(False, nothing_fits(made, limits, MARGIN) if made else _ALL_DIVERGED)
    chooses = [Scored(each.name, [each.predictions[row] for row in choosing], each.footprint) for _, each in found]
    by = [labels[row] for row in choosing]
    of_teacher = [teacher.predictions[row] for row in choosing]
    kept = chooses
    if "min_retention" in limits:
        ends = {each.name: least_retention(task, each, of_teacher, by) for each in chooses}
        kept = [each for each in chooses if ends[each.name] >= limits["min_retention"]]
        if not kept:
            name = max(ends, key=lambda name: -math.inf if math.isnan(ends[name]) else ends[name])
            return Compressed(False, nothing_retains(name, ends[name], limits))
    choice = choose(task, kept, by, tolerance=work.asked.tolerance)
    candidate, picked = next((each, scored) for each, scored in found if scored.name == choice.pick)
    said = reason_of(
        task,
        choice,
        Compared(picked.name, picked.predictions, picked.footprint),
        teacher,
        labels=labels,
        stating=stating.tolist(),
        among=len(kept),
        asked=work.asked,
    )
    report = _write(work, candidate, said, choice.runner_up)
    return Compressed(True, said, report)


def _write(work: Workplace, candidate: Candidate, said: str, runner_up: str | None) -> Report:
    """Write the pick's recipe, its steps' folders as links, the report, and the folder to serve."""
    lengths = work.lengths(candidate.shape)
    name, last = final_step(candidate, work.teacher, len(lengths))
    steps = {**work.teacher_steps(), **steps_of_shape(candidate.shape, work.teacher, lengths), **last}
    folder = work.asked.output_dir
    content = work.content(steps, folder)
    write_atomically(folder / "recipe.yaml", dump_yaml(content))
    plan = make_plan(load_recipe(folder / "recipe.yaml"))
    for step in steps:
        if (read_step(folder / step) or StepRecord()).fingerprint != plan.steps[step].fingerprint:
            linked(work.folder / step, folder / step)
    report = write_report(plan, pick=Pick(name, said, dict(work.limits), runner_up))
    linked(folder / name, folder / PICK)
    return report
