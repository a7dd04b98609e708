"""The keys of `data` of each task: type, range, default and meaning. A recipe is checked against them first."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from understudy.errors import InputError, nearest
from understudy.evaluation.leakage import Canaries
from understudy.synthetic.bandit import Noise
from understudy.synthetic.responses import Rejected

_Count = Annotated[int, Field(ge=1, strict=True)]
_Number = Annotated[int, Field(ge=0, strict=True)]
_Digit = Annotated[int, Field(ge=0, le=9, strict=True)]
_Share = Annotated[float, Field(ge=0, le=1, strict=True)]
_Flag = Annotated[bool, Field(strict=True)]
_Packing = Literal["auto", "free", "none"]


class _Images(BaseModel):
    name: str = Field(
        "digits", description="digits, digits_shift, clusters, subclusters, templates, a set, folder, file or Hub id."
    )
    limit: _Count | None = Field(
        None, description="Most training examples of the student; 200 of digits without a pool."
    )
    teacher_limit: _Count | None = Field(None, description="Most training examples of a teacher that is trained first.")
    image_column: str | None = Field(None, description="Column of a table that holds the images.")
    label_column: str | None = Field(None, description="Column of a table that holds the classes.")
    augment: _Flag | None = Field(None, description="Random crops and flips; on for CIFAR, off for others.")
    validation_size: _Count | None = Field(None, description="Examples set aside where there is no validation split.")
    with_validation: _Flag = Field(False, description="The student trains on the validation examples too.")
    imbalance: Annotated[float, Field(strict=True)] | None = Field(
        None, description="Examples of the first class for one of the last, falling by a constant factor between."
    )
    label_noise: _Share | None = Field(None, description="Share of the student's labels that become random.")
    teacher_random_classes: list[int] | None = Field(
        None, description="Classes whose examples have random labels where the teacher is trained."
    )
    modulo: Annotated[int, Field(strict=True)] | None = Field(None, description="Coarser classes: label modulo this.")
    label_map: list[int] | None = Field(None, description="Coarser classes: the new class of each class.")
    pool: str | list[str] | None = Field(
        None, description="A set, or several, whose images the student trains on without labels; limit counts these."
    )
    unlabelled: _Flag = Field(False, description="Hide the student's training labels.")
    labelled: _Count | None = Field(None, description="Hide all labels but so many of each class.")
    domain_column: str | None = Field(None, description="Column that names each example's domain.")
    only: str | None = Field(None, description="The one domain that is used.")
    for_teacher: _Flag = Field(
        False, description="Train on the teacher's part; set for a teacher that is trained first."
    )
    seed: _Number | None = Field(None, description="Of label noise and of made data.")
    size: Any = Field(None, description="Pixels that images are resized to: one number, or [height, width].")
    input_data_format: Literal["channels_first", "channels_last"] | None = Field(
        None, description="Axis of the channels of arrays; needed if their shape does not tell."
    )


class _Modalities(BaseModel):
    name: str = Field(
        "av_digits",
        description="av_digits, spoken_digits, or a file or folder of columns: .npz arrays, or a table of numbers or names of files.",
    )
    modalities: list[str] | None = Field(
        None, description="Columns of the modalities, the student's first; needed for data of your own."
    )
    label_column: str | None = Field(None, description="Column of the classes; label if not given.")
    size: Any = Field(None, description="Pixels that image files are resized to: one number, or [height, width].")
    input_data_format: Literal["channels_first", "channels_last"] | None = Field(
        None, description="Axis of the channels of arrays; needed if their shape does not tell."
    )
    limit: _Count | None = Field(None, description="Most training examples of the student.")
    teacher_limit: _Count | None = Field(None, description="Most training examples of a teacher that is trained first.")
    validation_size: _Count | None = Field(None, description="Examples set aside where there is no validation split.")
    label_noise: _Share | None = Field(None, description="Share of the student's labels that become random.")
    unlabelled: _Flag = Field(False, description="Hide the student's training labels.")
    labelled: _Count | None = Field(None, description="Hide all labels but so many of each class.")
    for_teacher: _Flag = Field(
        False, description="Train on the teacher's part; set for a teacher that is trained first."
    )
    seed: _Number | None = Field(None, description="Of label noise, of made data, and of drawn pairs.")


class _Text(BaseModel):
    name: str = Field("stdlib", description="stdlib, a set in UNDERSTUDY_DATA, a file, a folder or a Hub id.")
    max_length: _Count = Field(128, description="Tokens of a row; what is longer is cut.")
    pack: _Flag = Field(True, description="Join documents into rows of max_length.")
    packing: _Packing = Field(
        "auto", description="How batches are computed without padding: always, where cheaper, never."
    )
    truncation: Literal["end", "start", "error"] = Field("end", description="Which end of a row that is too long goes.")
    limit: _Count | None = Field(None, description="Most training records.")
    tokenizer: str | None = Field(None, description="Folder or Hub id whose way both sides use.")
    vocab_size: _Count = Field(1024, description="Of the tokenizer that is trained where no model brings one.")
    characters: _Count | None = Field(None, description="Most characters of stdlib.")
    domains: list[str] | None = Field(None, description="Domains of lm_domains that are read.")
    domain_column: str | None = Field(None, description="Column that names each record's domain.")
    only: str | None = Field(None, description="The one domain that is used.")
    columns: dict[str, str] | None = Field(None, description="Names of columns, as in {prompt: question}.")
    canaries: Canaries | None = Field(
        None, description="Secrets to plant in training texts; what is remembered of them is measured at the end."
    )


class _Preferences(BaseModel):
    name: str = Field("word_order", description="word_order, a set in UNDERSTUDY_DATA, a file, a folder or a Hub id.")
    max_length: _Count = Field(128, description="Tokens of prompt and completion; what is longer is cut.")
    packing: _Packing = Field(
        "auto", description="How batches are computed without padding: always, where cheaper, never."
    )
    limit: _Count | None = Field(None, description="Most training records.")
    tokenizer: str | None = Field(None, description="Folder or Hub id whose way both sides use.")
    vocab_size: _Count = Field(1024, description="Of the tokenizer that is trained where no model brings one.")
    characters: _Count = Field(300_000, description="Most characters of word_order.")
    candidates: _Count = Field(2, description="Candidates of each prompt of word_order.")
    columns: dict[str, str] | None = Field(None, description="Names of columns, as in {prompt: question}.")


class _World(BaseModel):
    name: str = Field("bandit", description="bandit, chains, markov or responses.")
    seed: _Number | None = Field(None, description="Of the world; the run's seed if not given.")
    noise: Noise = Field("heavy", description="Of the bandit's rewards.")
    start: Literal["own", "mixture", "tuned"] = Field(
        "own",
        description="Whose samples a policy of the chains is started on: their own, mostly another chain's, or better ones.",
    )
    label_noise: _Share | None = Field(None, description="Share of the chains' training pairs whose label is flipped.")
    rejected: Rejected = Field("optimal", description="Where rejected responses come from.")
    beta: Annotated[float, Field(gt=0)] = Field(
        0.5, description="Of the DPO that optimally rejected responses are for."
    )
    limit: _Count | None = Field(None, description="Most training contexts.")
    for_teacher: _Flag = Field(False, description="Train on the clean part; set for a policy that is trained first.")


class _Graph(BaseModel):
    name: str = Field("topics", description="topics, a set in UNDERSTUDY_DATA, an .npz file or planetoid:Cora.")
    split: Literal["transductive", "inductive"] = Field(
        "transductive", description="Inductive: a fifth of the test nodes is left out of training and evaluated."
    )
    fold: _Number = Field(0, description="Of several published splits.")
    seed: _Number = Field(0, description="Of what is drawn: hidden nodes, a split where there is none.")
    normalize: _Flag = Field(True, description="Divide each node's features by the sum of their magnitudes.")
    root: str | None = Field(None, description="Where Planetoid is downloaded to.")


class _Generation(_Images):
    name: str = Field(
        "digits", description="digits, ring8, noise (no data, only the teacher), a set, folder or Hub id."
    )
    size: _Count = Field(64_000, description="Noises in an epoch.")
    image_size: Any = Field(None, description="Pixels that images are resized to: one number, or [height, width].")
    samples: _Count | None = Field(None, description="Number of samples for evaluation; 4,000 points or 600 images.")
    rejected_column: str | None = Field(
        None, description="Column of a table of pairs that holds the worse image; data.image_column has the better one."
    )
    conditional: _Flag = Field(False, description="Generate by class.")
    guidance: float | None = Field(None, description="Weight of classifier-free guidance, with conditional.")
    null_class: _Flag = Field(False, description="The model has a further class that stands for none.")
    prediction: str | None = Field(None, description="What the model predicts: epsilon, sample or v_prediction.")
    compare_steps: list[int] = Field([1, 2, 4, 16], description="Steps of the sampler that are compared.")
    teacher_steps: _Count | None = Field(
        None, description="Steps of the teacher's sampler; 200 for points, 32 for images."
    )


class _Scenes(BaseModel):
    name: str = Field(
        "street2d", description="street2d, street, a set in UNDERSTUDY_DATA, or a file or folder of scans."
    )
    size: _Count = Field(600, description="Training scenes of a street.")
    samples: _Count = Field(100, description="Scenes of a street to validate and to test on, each.")
    seed: _Number = Field(0, description="Of the scenes of a street, and of the points that are kept.")
    points: _Count | None = Field(None, description="Points of a scan; 32 in the plane, else 128.")
    repeat: _Count = Field(8, description="Points of a completed scan for each of the scan's.")
    radius: Annotated[float, Field(gt=0)] = Field(
        10.0, description="Points further than this from the sensor go, in m."
    )
    guidance: float | None = Field(
        None, ge=0, description="Weight of classifier-free guidance; a hidden scan is all 0."
    )
    compare_steps: list[_Count] = Field([1, 2, 4, 8], min_length=1, description="Steps of the sampler to compare.")
    teacher_steps: _Count = Field(50, description="Steps of the teacher's sampler.")
    voxel: Annotated[float, Field(gt=0)] = Field(0.5, description="Side of the voxels of jsd and iou, in m.")


class _Ranking(BaseModel):
    name: str = Field(
        "world", description="world, a file of scored triples, or a folder of docs, queries and qrels, as BEIR's are."
    )
    query_length: _Count = Field(30, description="Most tokens of a query.")
    document_length: _Count = Field(200, description="Most tokens of a document.")
    queries: str | None = Field(None, description="File with the texts of query ids.")
    collection: str | None = Field(None, description="File with the texts of document ids.")
    members: list[str] | None = Field(None, description="Files that score the same triples by other teachers.")
    candidates: _Count | None = Field(None, description="Of the first stage, for each query.")
    negatives: _Count | None = Field(None, description="For each relevant document of a folder.")
    limit: _Count | None = Field(None, description="Most training rows.")
    seed: _Number | None = Field(None, description="Of the world and of the choice of negatives.")
    foreign: _Flag | None = Field(None, description="The world's teacher has a scale of its own and an offset a query.")
    tokenizer: str | None = Field(None, description="Folder or Hub id, for new models.")
    vocab_size: _Count = Field(4000, description="Of the tokenizer that is trained where no model brings one.")


class _ClassifiedTexts(BaseModel):
    name: str = Field("subjects", description="subjects, a set in UNDERSTUDY_DATA, a file, a folder or a Hub id.")
    max_length: _Count = Field(128, description="Tokens of a text or pair; what is longer is cut. 80 for subjects.")
    limit: _Count | None = Field(None, description="Most training records of the student, drawn once; 200 of subjects.")
    columns: dict[str, str] | None = Field(None, description="Names of columns, as in {text: review, label: stars}.")
    classes: list[str] | None = Field(
        None, description="Names of the classes by number; the model's or the data's if not given."
    )
    domain_column: str | None = Field(None, description="Column that names each record's domain.")
    unlabelled: _Flag = Field(False, description="Hide the student's training labels.")
    labelled: _Count | None = Field(None, description="Hide all labels but so many of each class.")
    for_teacher: _Flag = Field(
        False, description="Train on the teacher's part; set for a teacher that is trained first."
    )
    tokenizer: str | None = Field(None, description="Folder or Hub id, for new models.")
    vocab_size: _Count = Field(2000, description="Of the tokenizer that is trained where no model brings one.")


class _Reasoning(BaseModel):
    name: str = Field(
        "sums", description="sums, gsm8k, svamp, aqua, commonsense_qa, strategyqa, a file, a folder or a Hub id."
    )
    max_length: _Count = Field(48, description="Tokens of question, rationale and answer; 512 of other data than sums.")
    packing: _Packing = Field(
        "auto", description="How batches are computed without padding: always, where cheaper, never."
    )
    truncation: Literal["end", "start", "error"] = Field(
        "start", description="Which end of a row that is too long goes."
    )
    limit: _Count | None = Field(None, description="Most training records.")
    eval_limit: _Count | None = Field(None, description="Most questions of validation, and of test.")
    tokenizer: str | None = Field(None, description="Folder or Hub id whose way both sides use.")
    vocab_size: _Count = Field(1024, description="Of the tokenizer that is trained where no model brings one.")
    columns: dict[str, str] | None = Field(None, description="Names of columns, as in {question: problem}.")
    prompt: str = Field(
        "question", description="File with the slot `question`; `bare` (of sums) is the question alone."
    )
    rationale: _Flag = Field(True, description="Train on rationale and answer; off, on the answer alone.")
    answers: Literal["number", "choice", "yes_no", "text"] | None = Field(
        None, description="What an answer is; by all the answers of the data if not given."
    )
    samples: _Number = Field(4, description="Sampled answers to each judged question, for pass@k and majority@k.")
    temperature: Annotated[float, Field(gt=0)] = Field(0.7, description="Of these samples.")
    max_new_tokens: _Count = Field(
        32, description="Of a written answer with its rationale; 256 of other data than sums."
    )
    digits: tuple[_Count, _Count] | None = Field(
        None, description="Least and most digits of sums; 4 and 6 if not given."
    )
    size: _Count | None = Field(None, description="Training questions of sums; 3000 if not given.")
    seed: _Number | None = Field(None, description="Of sums.")
    styles: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None, description="Weights of styles that solutions of sums are written in, as in {ordered: 1, bare: 1}."
    )
    shots: _Number = Field(0, description="Solved training questions before each question, of its style if it has one.")
    teacher_error: _Share = Field(
        0.03, description="Share of wrong steps of the oracle of sums, as a teacher that writes."
    )
    systematic_error: tuple[_Digit, _Digit] | None = Field(
        None, description="A sum so far and a digit that this teacher always adds wrongly, by one, as in [7, 8]."
    )
    evaluator_noise: Annotated[float, Field(ge=0)] = Field(
        0.35,
        description="Standard deviation of the oracle of sums as an evaluator, about 0.65 of right and 0.35 of wrong steps.",
    )


class _Corpus(BaseModel):
    name: str = Field("events_world", description="events_world, events, or a file of seed events.")
    relations: str | None = Field(
        None, description="File of relations with their prompts; the built-in ones if not given."
    )
    labels: str | None = Field(None, description="File of triples with human labels, for the critic.")
    world_seed: _Number | None = Field(None, description="Of events_world; the run's seed if not given.")
    max_length: _Count = Field(64, description="Tokens of a training row.")
    vocab_size: _Count | None = Field(None, description="Of the tokenizer that is trained where no model brings one.")
    tokenizer: str | None = Field(None, description="Folder or Hub id, for a new student.")
    columns: dict[str, str] | None = Field(None, description="Names of columns, as in {event: text}.")


class _Statements(BaseModel):
    name: str = Field("generics_world", description="generics_world, generics, or a file of concepts, one a line.")
    relations: str | None = Field(
        None, description="File of relational phrases, one a line; the built-in ones if not given."
    )
    labels: str | None = Field(
        None, description="File of statements (head, relation, tail) with human labels, for the critic."
    )
    world_seed: _Number | None = Field(None, description="Of generics_world; the run's seed if not given.")
    sentences: _Count | None = Field(
        None, description="Of generics_world, that a new model is first trained on; 20000 if not given."
    )
    max_length: _Count = Field(32, description="Tokens of a training row.")
    vocab_size: _Count | None = Field(None, description="Of the tokenizer that is trained for a new model.")
    tokenizer: str | None = Field(None, description="Folder or Hub id, for a new model.")
    columns: dict[str, str] | None = Field(None, description="Names of columns, as in {text: concept}.")


class _Conversations(BaseModel):
    name: str = Field("support", description="support, a set in UNDERSTUDY_DATA, a file, a folder or a Hub id.")
    limit: _Count | None = Field(None, description="Most training conversations.")
    eval_limit: _Count | None = Field(None, description="Most conversations of validation, and of test.")
    columns: dict[str, str] | None = Field(None, description="Names of columns, as in {prompt: message, type: topic}.")
    seed: _Number | None = Field(None, description="Of support; the run's seed if not given.")
    teacher_error: _Share = Field(
        0.05, description="Share of requests whose best action the teacher of support mistakes."
    )
    follows: _Share = Field(0.85, description="How often the student of support follows advice.")


class _ImageTexts(BaseModel):
    name: str = Field("scenes", description="scenes, a set in UNDERSTUDY_DATA, a file, a folder or a Hub id.")
    max_length: _Count = Field(
        2048, description="Tokens of prompt, images and completion; what is longer is cut. 64 for scenes."
    )
    max_new_tokens: _Count = Field(64, description="Of an answer in evaluation; 28 for scenes.")
    eval_limit: _Count = Field(200, description="Most records of validation, and of test, whose prompts are answered.")
    limit: _Count | None = Field(None, description="Most training records.")
    columns: dict[str, str] | None = Field(None, description="Names of columns, as in {prompt: question}.")
    unpaired: _Flag = Field(False, description="Keep single completions beside pairs, for methods of preferences.")
    processor: str | None = Field(None, description="Folder or Hub id of the processor, for new models and modules.")
    vocab_size: _Count = Field(320, description="Of the tokenizer that is trained where no model brings one.")
    image_size: _Count = Field(24, description="Pixels of an image, for new models.")
    patch_size: _Count = Field(8, description="Pixels of a patch, for new models.")
    size: _Count | None = Field(None, description="Training scenes; 4000 if not given.")
    pairs: _Count | None = Field(None, description="Training pairs of scenes; 1500 if not given.")
    seed: _Number | None = Field(None, description="Of the scenes.")


class _Letters(BaseModel):
    name: str = Field(
        "letters", description="letters: texts of a random network; markov: of a chain. Both are the oracle."
    )
    seed: _Number | None = Field(None, description="Of the world; the run's seed if not given.")
    prompts: _Count = Field(20, description="Prompts to distil on; letters only.")
    texts: _Count = Field(
        2000,
        description="Texts of the oracle that teacher and student have learned from before; of markov those to distil on.",
    )
    held_out: _Count = Field(500, description="Prompts of validation, and of test.")
    for_teacher: _Flag = Field(False, description="Train on the oracle's texts; set for a model that is trained first.")


KEYS: dict[str, type[BaseModel]] = {
    "vision_language": _ImageTexts,
    "image_classification": _Images,
    "multimodal_classification": _Modalities,
    "language_modeling": _Text,
    "preferences": _Preferences,
    "preference_world": _World,
    "node_classification": _Graph,
    "image_generation": _Generation,
    "scene_completion": _Scenes,
    "ranking": _Ranking,
    "reasoning": _Reasoning,
    "text_generation": _Corpus,
    "text_classification": _ClassifiedTexts,
    "conversation": _Conversations,
    "statement_generation": _Statements,
    "text_world": _Letters,
}
"""By task."""


def check_data_keys(task: str, values: Mapping[str, Any]) -> None:
    """Check the keys and values of `data`.

    Raises:
        InputError: an unknown key, with the nearest known one and all of them; or a value of the wrong type or range.
    """
    known = KEYS[task].model_fields
    for key, value in values.items():
        if key not in known:
            raise InputError(
                f"Unknown key data.{key}.{nearest(key, known)} Known: {', '.join(sorted(known))} (`understudy keys data`)."
            )
        try:
            _adapter(task, key).validate_python(value)
        except ValidationError as error:
            raise InputError(f"data.{key} is {value!r}: {error.errors()[0]['msg']}.") from None


@cache
def _adapter(task: str, key: str) -> TypeAdapter[Any]:
    field = KEYS[task].model_fields[key]
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(kind)
