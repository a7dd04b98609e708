"""12. DisWOT: Student Architecture Search for Distillation WithOut Training (2023).

How well an architecture will learn from a teacher's is told before any training, by how alike both see one batch with
random weights. With F the features before pooling and S the maps of the classes (features weighted by the head),

    D_rel = Σ (R_t − R_s)² / B²,  R the Gram matrix of F over images, its rows divided by their norms
    D_sem = Σ (S_t − S_s)² / N²,  likewise of the maps over classes
    score = −(D_rel + D_sem)

`diswot` searches a space of students by the score, and distils the best. `diswot-kd` trains with D_rel and D_sem.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from understudy.architectures import (
    Budget,
    Candidate,
    CandidateLog,
    Correlation,
    Examiner,
    Range,
    Semantic,
    Space,
    TeacherSimilarity,
    evolve,
    jacobian_score,
    random_score,
    rank_correlation,
    ranked,
    synflow_score,
)
from understudy.data import Batch
from understudy.data.text import write_records
from understudy.errors import InputError
from understudy.files import read_json
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.features import feature_map
from understudy.losses.instances import by_group, class_map_mse, similarity_mse
from understudy.models import ClassifierAdapter, ModelAdapter, ModelOutput, find_head
from understudy.models.taps import called_layers, layer, stages
from understudy.streaming import rowwise
from understudy.tasks import Prepared
from understudy.tasks import get as get_task
from understudy.tasks.base import MODULE
from understudy.training import Method, Pipeline, PipelineContext, Requirements, SetupContext, Term, TrainState
from understudy.training.shapes import look

Score = Literal["diswot", "relation", "semantic", "synflow", "jacobian", "parameters", "operations", "random"]
SCORES: tuple[str, ...] = get_args(Score)
_SHOWN = 20  # candidates in the report


class DisWOT(Pipeline):
    """Search of a student for a teacher without training; then the best is distilled."""

    name = "diswot"
    paper = 12
    kinds = frozenset({"image"})
    teacher_writes = False
    cost = "three forward passes of one batch a candidate; then an ordinary run of the best"
    page: ClassVar[dict[str, str]] = {
        "when": "A teacher, a bound on the student's parameters, operations or latency, and no idea which network to take. "
        "`understudy search` is the command. Set `train` to see on a sample of your own space whether the score is of use.",
        "not": "Where all candidates can be trained, or differ in size above all: then the largest within the budget is as "
        "good a choice.",
        "deviations": "The semantic score compares class maps (`semantic=cam`, whose normalisation is reconstructed), because "
        "the released one, on gradients of the head (`grad`), needs heads of one width. All candidates see one batch; the "
        "released script draws one each. A score is the mean over three initialisations. The parent in the evolution is the "
        "best of its sample (the released code mostly takes poor ones), and both terms are used (the released search has one). "
        "A space of no more than `evaluations` is scored as a whole. Other scores use the networks' own initialisation.",
    }

    students: tuple[str, ...] = Field(
        ("cnn:{width1}x{depth1}k{kernel1},{width2}x{depth2}k{kernel2},{width3}x{depth3}k{kernel3}{skip}",),
        description="Names of small networks with blanks in braces.",
    )
    ranges: dict[str, Range | tuple[int | float | str, ...]] = Field(
        {
            **{f"width{i}": (8, 16, 32) for i in (1, 2, 3)},
            **{f"depth{i}": (1, 2) for i in (1, 2, 3)},
            **{f"kernel{i}": (1, 3, 5) for i in (1, 2, 3)},
            "skip": ("", ",skip"),
        },
        description="Values of each blank: a list, or `{low: 8, high: 64, step: 8}`.",
    )
    parameters: int | None = Field(None, ge=1, description="Most parameters of a student.")
    min_parameters: int = Field(0, ge=0, description="Fewest.")
    operations: float | None = Field(None, gt=0, description="Most floating-point operations of an image.")
    latency: float | None = Field(None, gt=0, description="Most milliseconds of an image, measured here on the CPU.")
    score: Score = Field("diswot", description="What candidates are ranked by.")
    semantic: Semantic = Field("cam", description="Semantic score: of class maps, or of the head's gradients.")
    images: int = Field(64, ge=2, description="Of the batch that all candidates see.")
    repeats: int = Field(3, ge=1, description="Initialisations that a score is the mean of.")
    evaluations: int = Field(1000, ge=1, description="Candidates to score, at most.")
    population: int = Field(36, ge=2, description="Of the evolution.")
    tournament: int = Field(8, ge=1, description="Candidates of which the best becomes a parent.")
    train: int = Field(0, ge=0, description="Candidates, drawn at random, to train for the rank correlation.")
    train_seeds: int = Field(1, ge=1, description="Runs of each of them.")
    train_steps: int | None = Field(None, ge=1, description="Optimizer steps of these runs; the recipe's if not given.")
    distil: str = Field("kd", description="Method that the best, and the sample, are trained by.")
    distil_options: dict[str, Any] = Field({}, description="Its options.")

    @model_validator(mode="after")
    def _searches(self) -> Self:
        from understudy.methods import get  # the registry is complete only after this file

        method = get(self.distil)
        if issubclass(method, Pipeline) or not method.kinds & {"image", "classification"}:
            raise ValueError(f"distil is {self.distil!r}, which trains no classifier of images: kd, pld or another")
        method(**self.distil_options)
        Space(self.students, self.ranges)
        if self.train > self.evaluations:
            raise ValueError(f"train ({self.train}) is more than evaluations ({self.evaluations})")
        return self

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="setup")

    def run(self, context: PipelineContext) -> dict[str, Any]:
        found, left_out = self._search(context)
        best = ranked(found, self.score)
        trained = self._train_sample(context, found[: self.train])
        winner = self._distil(context, "winner", best[0].student, context.recipe["seed"])
        accuracies = {name: statistics.fmean(values) for name, values in trained.items()}
        write_records(
            context.folder / "stages" / "ranking.jsonl",
            [
                {
                    "rank": i,
                    **c.model_dump(mode="json", exclude={"key", "fits", "why"}),
                    "trained": trained.get(c.student),
                }
                for i, c in enumerate(best, 1)
            ],
        )
        seen = [c for c in found if c.student in accuracies]
        correlations = {score: _correlation(seen, score, accuracies) for score in SCORES}
        evaluation = self._report(context, best, accuracies, correlations, winner)
        return {**evaluation, "notes": [*evaluation["notes"], *_left_out(left_out)]}

    # -- search -------------------------------------------------------------------------------------------------------

    def _search(self, context: PipelineContext) -> tuple[list[Candidate], list[Candidate]]:
        """Candidates with their scores, those drawn at random first; and those that have none, with the reason."""
        task, spec = get_task(context.recipe["task"]), context.models.get("teacher")
        if spec is None or spec.endpoint is not None or spec.model.startswith(MODULE):
            raise InputError("Method 'diswot' reads the teacher's architecture: name one model that runs here.")
        prepared = task.prepare(SimpleNamespace(data=context.recipe["data"], student=None))
        batch, seed = self._batch(prepared, context.recipe["seed"]), context.recipe["seed"]
        teacher: Any = task.model(spec, prepared)
        similarity = TeacherSimilarity(teacher, batch, seed=seed, repeats=self.repeats, semantic=self.semantic)

        def score(name: str, student: ClassifierAdapter) -> dict[str, float | None]:
            own = {
                "synflow": synflow_score(student.model, prepared.input_shape),
                "jacobian": jacobian_score(student.model, student.shown(batch.inputs["pixel_values"])),
                "random": random_score(name, seed),
            }
            return {**similarity(student), **own}

        log = CandidateLog(context.folder / "stages" / "candidates.jsonl", self._key(spec, batch, seed))
        budget = Budget(self.parameters, self.min_parameters, self.operations, self.latency)
        found = evolve(
            Space(self.students, self.ranges),
            Examiner(prepared.classes, prepared.input_shape, budget, log, score, seed),
            self.score,
            evaluations=self.evaluations,
            population=self.population,
            tournament=self.tournament,
            first=self.train,
            seed=42 + seed,
        )
        return found, [c for c in log.known.values() if not c.fits]

    def _batch(self, prepared: Prepared, seed: int) -> Batch:
        """The images that all candidates see."""
        order = torch.randperm(len(prepared.train), generator=torch.Generator().manual_seed(seed))
        return Batch.from_dict(prepared.collate([prepared.train[i] for i in order[: self.images].tolist()]))

    def _key(self, teacher: Any, batch: Batch, seed: int) -> str:
        """What scores, and whether a candidate fits, depend on."""
        kept = {"semantic", "repeats", "parameters", "min_parameters", "operations", "latency"}
        facts = [self.model_dump(mode="json", include=kept), teacher.model, seed]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for tensor in (batch.inputs["pixel_values"], batch.labels):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    # -- training -----------------------------------------------------------------------------------------------------

    def _distil(self, context: PipelineContext, name: str, student: str, seed: int, steps: int | None = None) -> Any:
        recipe = context.recipe
        values = {
            **recipe,
            "method": self.distil,
            "options": self.distil_options,
            "student": {**(recipe.get("student") or {}), "model": student},
            "seed": seed,
            "trainer": {**recipe.get("trainer", {}), **({"max_steps": steps} if steps else {})},
            "arms": {},
        }
        return context.train(name, values)

    def _train_sample(self, context: PipelineContext, sample: Sequence[Candidate]) -> dict[str, list[float]]:
        """The accuracy of each candidate after training, by seed."""
        metric, found = get_task(context.recipe["task"]).metric, {}
        for candidate in sample:
            place = re.sub(r"[^\w.=+-]+", "-", candidate.student)
            found[candidate.student] = [
                self._distil(context, f"runs/{place}-s{s}", candidate.student, s, self.train_steps).metrics[metric]
                for s in range(context.recipe["seed"], context.recipe["seed"] + self.train_seeds)
            ]
        return found

    # -- report -------------------------------------------------------------------------------------------------------

    def _report(
        self,
        context: PipelineContext,
        best: Sequence[Candidate],
        accuracies: Mapping[str, float],
        correlations: Mapping[str, Correlation | None],
        winner: Any,
    ) -> dict[str, Any]:
        """The winner's evaluation, and what was found of the scores."""
        evaluation = read_json(winner.folder / "evaluation.json") or {}
        metric = get_task(context.recipe["task"]).metric
        metrics = {**evaluation["metrics"], "scored_candidates": len(best)}
        metrics["search_seconds"] = sum(c.seconds for c in best)
        for score, found in correlations.items():
            if found is not None:
                metrics[f"rank_correlation_{score}"] = found.rho
        own = correlations[self.score]
        if own is not None:
            metrics |= {"rank_correlation": own.rho, "rank_correlation_low": own.low}
        if accuracies and self.train_steps is None:
            metrics["above_median"] = metrics[metric] - statistics.median(accuracies.values())
        lost = sum(c.score(self.score) is None for c in best)
        notes = [f"The winner is {best[0].student}, distilled by {self.distil}: its run is in {winner.folder.name}/."]
        notes += [f"{lost} candidates have no finite score and are ranked last."] if lost else []
        sample = [c for c in best if c.student in accuracies and c.score(self.score) is not None]
        return {
            **evaluation,
            "metrics": metrics,
            "pictures": {},
            "explained": EXPLAINED,
            "notes": [*notes, *evaluation.get("notes", [])],
            "tables": [_ranking(best, accuracies), *_correlations(correlations)],
            "scatters": [_scatter(sample, self.score, accuracies, metric)] if len(sample) > 1 else [],
        }


def _left_out(candidates: Sequence[Candidate]) -> list[str]:
    """Notes on candidates without scores: those beyond the budget, and those that failed, which have no parameters."""
    beyond, failed = ([c for c in candidates if (c.parameters > 0) == built] for built in (True, False))
    notes = [f"{len(beyond)} candidates are beyond the budget and were not scored."] if beyond else []
    if failed:
        notes.append(f"{len(failed)} candidates cannot be scored, for example {failed[0].student}: {failed[0].why}")
    return notes


def _correlation(seen: Sequence[Candidate], score: str, accuracies: Mapping[str, float]) -> Correlation | None:
    pairs = [(value, accuracies[c.student]) for c in seen if (value := c.score(score)) is not None]
    return rank_correlation([x for x, _ in pairs], [y for _, y in pairs])


def _number(value: float | None) -> str:
    return f"{value:.4g}" if value is not None else "–"


def _ranking(best: Sequence[Candidate], accuracies: Mapping[str, float]) -> dict[str, Any]:
    rows = [
        [i, c.student, *(_number(c.score(s)) for s in SCORES), _number(c.latency), _number(accuracies.get(c.student))]
        for i, c in enumerate(best[:_SHOWN], 1)
    ]
    return {
        "title": f"The first {len(rows)} of {len(best)} candidates",
        "headings": ["rank", "student", *SCORES, "ms", "trained"],
        "rows": rows,
    }


def _correlations(correlations: Mapping[str, Correlation | None]) -> list[dict[str, Any]]:
    rows = [
        [score, f"{c.rho:+.2f} [{c.low:+.2f}, {c.high:+.2f}]", f"{c.tau:+.2f}"]
        for score, c in correlations.items()
        if c is not None
    ]
    headings = ["score", "Spearman's ρ [95 %, bootstrap]", "Kendall's τ"]
    return (
        [{"title": "Scores before training and accuracy after it", "headings": headings, "rows": rows}] if rows else []
    )


def _scatter(sample: Sequence[Candidate], score: str, accuracies: Mapping[str, float], metric: str) -> dict[str, Any]:
    return {
        "title": f"{score} and {metric}",
        "xlabel": f"{score}, before training",
        "ylabel": f"{metric}, after training",
        "points": [[c.score(score), accuracies[c.student]] for c in sample],
        "caption": f"{len(sample)} candidates drawn at random from the space, each trained.",
    }


EXPLAINED = {
    "scored_candidates": "Candidates within the budget that were scored.",
    "search_seconds": "Time that scoring them took.",
    "rank_correlation": "Spearman's correlation of the score with accuracy after training, over the sample.",
    "rank_correlation_low": "Lower end of its 95 % bootstrap interval.",
    "above_median": "Accuracy of the winner minus the median of the trained sample.",
    **{f"rank_correlation_{score}": f"The same correlation of the score {score}." for score in SCORES},
}


class DisWOTKD(Method):
    """Distillation with DisWOT's two similarities as losses (DisWOT†).

        loss = CE + λ τ² KL(teacher_τ ‖ student_τ) + w_s D_sem + w_r D_rel

    D_sem and D_rel are those of `diswot`, of the trained student's maps.
    """

    name = "diswot-kd"
    kinds = frozenset({"image"})
    cost = "as kd, and images² · width operations a group of images"
    page: ClassVar[dict[str, str]] = {
        "when": "Convolutional networks of any two widths, above all for the winner of `understudy search` "
        "(`options.distil=diswot-kd`).",
        "not": "With groups of few images, which have few relations; with a head that does not read the pooled channels.",
        "deviations": "The class maps' normalisation is reconstructed. Images are coupled inside groups of `group` consecutive "
        "ones, so that a batch may be cut between groups. τ = 4 is that of the released code's family.",
    }

    ce_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the labels.")
    kd_weight: float = Field(1.0, ge=0, description="Weight of the softened classes.")
    relation_weight: float = Field(1.0, ge=0, description="Weight of D_rel, similarities among images.")
    semantic_weight: float = Field(1.0, ge=0, description="Weight of D_sem, similarities among class maps.")
    temperature: float = Field(4.0, gt=0, description="τ of the softened classes.")
    group: int = Field(64, ge=2, description="Consecutive images that are compared with each other.")
    student_layer: str | None = Field(None, description="Layer to read; the last before pooling if not given.")
    teacher_layer: str | None = Field(None, description="Likewise, of the teacher.")

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher_layers=True, teacher_model=True, temperature=self.temperature)

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        head: Any = find_head(context.live_teacher())
        if head is None:
            raise InputError(f"Method {self.name!r} needs a teacher with a linear head of the classes.")
        return {"teacher_head": head.weight.detach()}

    def taps(self, side: Literal["student", "teacher"], model: ModelAdapter, batch: Batch) -> Mapping[str, nn.Module]:
        name = self.student_layer if side == "student" else self.teacher_layer
        if name is not None:
            return {"map": layer(model.model, name)}
        found = stages(called_layers(model.model, lambda: look(model, batch)))
        if not found or find_head(model) is None:
            raise InputError(
                f"Method {self.name!r} needs a {side} with inner features and a linear head of the classes."
            )
        return {"map": found[-1]}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None and state.student is not None
        kd = rowwise(forward_kl, student.signal, teacher.signal, temperature=self.temperature, tau_squared=True)
        terms = {"kd": Term(kd, self.kd_weight)}
        if self.ce_weight:
            terms["ce"] = Term(rowwise(cross_entropy, student.signal, None, batch.row_labels), self.ce_weight)
        ours, theirs = (feature_map(side.taps["map"][batch.mask]) for side in (student, teacher))
        head: Any = find_head(state.student)
        heads = {"student_head": head.weight, "teacher_head": state.tables["teacher_head"].to(theirs.device)}
        with torch.autocast(ours.device.type, enabled=False):
            relation = by_group(similarity_mse, ours.flatten(1), theirs.flatten(1), self.group)
            terms["relation"] = Term(relation, self.relation_weight)
            terms["semantic"] = Term(
                by_group(partial(class_map_mse, **heads), ours, theirs, self.group), self.semantic_weight
            )
        return terms
