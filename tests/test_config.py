"""What a recipe may hold, and what is said of the rest: arguments of Trainer, secrets, YAML, names, keys, aliases."""

import json
import logging
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import understudy
from engine_cases import DIGITS, TEXT
from understudy import distill
from understudy.cli import main
from understudy.cli.options import out
from understudy.data import (
    classified_texts,
    conversations,
    graphs,
    image_texts,
    images,
    paired,
    preferences,
    retrieval_sources,
    text,
)
from understudy.errors import InputError
from understudy.keys import matching, page, sections
from understudy.masking import MASK, masked, masked_text
from understudy.methods import all_methods, built_in, resolve
from understudy.reading import parse_json, parse_yaml, read_yaml
from understudy.runs.recipe import make
from understudy.tasks import TASKS
from understudy.tasks.data_keys import KEYS
from understudy.training.arguments import checked_arguments, dry_run_arguments

SECRET = "hf_averysecretvalue"


def call(capsys, *words):
    """A command's exit code, output and errors."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, words)))
    found = capsys.readouterr()
    return stop.value.code, found.out, found.err


ARGUMENTS = {
    "max_steps": ("x", "valid integer"),
    "gradient_accumulation_steps": (0, "greater than or equal to 1"),
    "per_device_train_batch_size": (-1, "greater than or equal to 1"),
    "per_device_eval_batch_size": (1.5, "valid integer"),
    "num_train_epochs": (-3, "greater than 0"),
    "learning_rate": ("fast", "valid number"),
    "weight_decay": (-0.1, "greater than or equal to 0"),
    "adam_beta1": (1.0, "less than 1"),
    "adam_beta2": (True, "true or false"),
    "warmup_steps": (-1, "greater than or equal to 0"),
    "max_grad_norm": ([], "valid number"),
    "report_to": (True, "Known: none, all"),
    "save_total_limit": ("x", "valid integer"),
    "save_steps": (0, "greater than 0"),
    "logging_steps": (None, "valid number"),
    "logging_strategy": ("stepz", "Did you mean 'steps'"),
    "eval_strategy": ("never", "Known: no, steps, epoch"),
    "optim": ("adamw_torc", "Did you mean 'adamw_torch'"),
    "lr_scheduler_type": ("cosin", "Did you mean 'cosine'"),
    "lr_scheduler_kwargs": (3, "valid dictionary"),
    "bf16": ("maybe", "valid boolean"),
    "data_seed": (2**32, "less than 4294967296"),
    "dataloader_num_workers": (-1, "greater than or equal to 0"),
    "log_level": ("loud", "Known: detail"),
    "neftune_noise_alpha": (5.0, "not supported"),
    "label_smoothing_factor": (0.1, "not supported"),
    "use_liger_kernel": (True, "not supported"),
    "push_to_hub": (True, "not supported: a finished student is pushed by `understudy push RUN REPO`"),
    "hub_token": (SECRET, "not supported: the Hub's token is the one of the environment variable HF_TOKEN"),
    "bf16_full_eval": (True, "not supported: evaluations are the task's own"),
    "train_sampling_strategy": ("group_by_length", "not supported: the order is that of trainer.data_seed"),
    "average_tokens_across_devices": (False, "not supported: an update is divided by the counts of all devices"),
    "include_for_metrics": (["loss"], "not supported"),
    "ignore_data_skip": (True, "not supported: a resumed run goes on with the next examples"),
    "save_only_model": (True, "not supported: a run goes on from its checkpoints here"),
    "log_level_replica": (1, "Known: detail"),
}


@pytest.mark.parametrize("key", ARGUMENTS)
@pytest.mark.parametrize("where", ["trainer", "teacher.train"])
def test_arguments_of_trainer_are_checked_in_the_recipe(key, where):
    value, says = ARGUMENTS[key]
    recipe = {"trainer": {key: value}} if where == "trainer" else {"teacher": {"model": "mlp:4", "train": {key: value}}}
    with pytest.raises(InputError, match=rf"^{where}\.{key} .*{re.escape(says)}"):
        make(recipe)


REHEARSED = [
    ({"report_to": "wandb"}, "wandb is not installed"),
    ({"report_to": ["tensorboard", "mlflow"]}, "is not installed"),
    ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
    ({"optim": "galore_adamw"}, "galore_torch, which is not installed"),
    ({"deepspeed": "x"}, "deepspeed, which is not installed"),
    ({"optim_args": "x"}, "cannot be used"),
    ({"lr_scheduler_kwargs": {"x": 1}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
    ({"fp16": True, "bf16": True}, "not both"),
    ({"accelerator_config": {"x": 1}}, "unexpected keyword"),
    ({"debug": "x"}, "DebugOption"),
    ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
    ({"load_best_model_at_end": True}, "strategy to match"),
]


@pytest.mark.parametrize(("values", "says"), REHEARSED)
def test_what_this_machine_cannot_do_is_said_before_a_model_is_loaded(values, says, monkeypatch):
    import understudy.training.arguments as arguments

    monkeypatch.setattr(arguments, "get_available_reporting_integrations", list)
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=says) as found:
        dry_run_arguments(checked_arguments(values, "trainer"))
    assert "\n" not in str(found.value)


def test_a_bad_combination_stops_a_run_before_its_teacher_is_trained(tmp_path):
    with pytest.raises(InputError, match="not both"):
        distill({**DIGITS, "method": "kd", "output": str(tmp_path / "run"), "trainer": {"fp16": True, "bf16": True}})
    assert not (tmp_path / "run" / "teacher").exists()


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"output": "~nouser/x"}, "no user of this name"),
        ({"data": "~nouser/x", "task": "language_modeling"}, "no user of this name"),
        ({"output": "a\0b"}, "output holds a NUL"),
        ({"student": {"model": "\ud800"}}, r"student.model holds half a surrogate"),
        ({"seed": 2**32}, "seed"),
        ({"seed": 10**400}, "seed is a number of more than 18 digits"),
        ({3: 1}, "key 3 is an int"),
        ({"data": {None: 1}}, "Recipe key data: key None"),
        ({"loss_type": "kto", "method": "dpo"}, "write options.loss_type"),
        ({"learning_rate": 1}, "write trainer.learning_rate"),
        ({"data": {"name": "digits", "limit": "many"}}, "data.limit is 'many'"),
        ({"data": {"name": "digits", "augment": 1}}, "data.augment is 1"),
        ({"data": {"name": "digits", "max_length": 3}}, "Unknown key data.max_length"),
        ({"data": {"name": 3}}, "data.name is 3"),
    ],
)
def test_what_no_recipe_can_hold_is_named(recipe, says):
    with pytest.raises(InputError, match=says):
        task = make(recipe)
        TASKS[task.task].prepare(task)


def test_aliases_that_unfold_without_end_are_refused_at_once():
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    began = time.perf_counter()
    with pytest.raises(InputError, match=r"line \d+: more than 100,000 values"):
        parse_yaml(bomb, "Recipe r.yaml")
    merged = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
    with pytest.raises(InputError, match="more than 100,000 values"):
        parse_yaml(merged, "Recipe r.yaml")
    with pytest.raises(InputError, match="an alias holds itself"):
        parse_yaml("a: &a [*a]", "Recipe r.yaml")
    assert time.perf_counter() - began < 1
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a", "r") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1},
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: 1\nb: [1\nc: 2\n", r"line 3: not valid YAML"),
        (b"a: 1\na: 2\n", r"line 2: key 'a' stands twice"),
        (b"a: \xff\n", "is not UTF-8"),
        (b"a: \x00\n", "not valid YAML"),
        (b"[" * 5000, "nested too deep"),
        (b"a: !!python/object:os.system {}\n", "line 1: not valid YAML"),
    ],
)
def test_damaged_yaml_is_a_line_with_file_and_line(content, says, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^Recipe {re.escape(str(path))}.*{says}"):
        read_yaml(path, "Recipe")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1,\n "b": }', "line 2: not valid JSON"),
        (b"\xff", "is not UTF-8"),
        (b"[" * 200_000, "nested too deep"),
        (b"1" * 10_000, "not valid JSON"),
    ],
)
def test_damaged_json_is_a_line_with_file_and_line(content, says, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}.*{says}"):
        parse_json(path.read_bytes(), str(path))
    assert parse_json('{"a": [1]}', "x") == {"a": [1]}


def test_secrets_are_masked_by_field_and_in_text():
    values = {
        "hub_token": SECRET,
        "Authorization": "Bearer abc",
        "api-key": 12,
        "token": True,
        "password": None,
        "tokenizer": "x",
    }
    shown = masked({"deep": [values], "url": "https://me:pw@host/x"})
    assert shown["deep"][0] == {
        **{"hub_token": MASK, "Authorization": MASK, "api-key": MASK},
        **{"token": True, "password": None, "tokenizer": "x"},
    }
    assert shown["url"] == f"https://{MASK}@host/x"
    for said in (
        f"trainer.hub_token = '{SECRET}': no",
        f"{{'api_key': '{SECRET}'}}",
        f"x.token={SECRET} y",
        f"Bearer {SECRET}",
    ):
        assert SECRET not in masked_text(said) and MASK in masked_text(said)
    plain = "Did you mean 'tokenizer'? data.tokenizer=FOLDER ends with token 3; eos_token = '</s>'"
    assert masked_text(plain) == plain


def test_no_secret_leaves_the_process(tmp_path, capsys):
    folder = tmp_path / "run"
    recipe = {**DIGITS, "method": "sft", "teacher": None, "output": str(folder), "arms": {"kd": {"api_key": SECRET}}}
    recipe["trainer"] = {"max_steps": 2, "per_device_train_batch_size": 4}
    distill(recipe)
    written = [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not written
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["arms"]["kd"]["api_key"] == MASK
    distill(recipe)  # the folder is recognised as the same run
    with pytest.raises(InputError) as found:
        distill({**recipe, "trainer": {**recipe["trainer"], "learning_rate": 0.5}})
    assert SECRET not in str(found.value)
    for bad in (f"trainer.hub_token=[{SECRET}]", f"trainer.hub_token={{{SECRET}", f"options.api_key={SECRET}"):
        code, shown, said = call(capsys, "train", "task=image_classification", bad)
        assert code == 2 and SECRET not in shown + said and said.count("\n") == 1
    code, shown, said = call(
        capsys, "train", "task=language_modeling", f"teacher={{model: x, endpoint: {{api_key: {SECRET}}}}}"
    )
    assert code == 2 and SECRET not in said


def test_what_is_unforeseen_is_one_line_and_a_file(tmp_path, capsys, monkeypatch):
    import understudy.runs.run

    def broken(recipe, **options):
        raise RuntimeError(f"something\nnobody [b]thought[/b] of, hub_token={SECRET}")

    monkeypatch.setattr(understudy.runs.run, "run", broken)
    folder = tmp_path / "run"
    folder.mkdir()
    words = ("train", "task=image_classification", f"output={folder}")
    code, _, said = call(capsys, *words)
    assert code == 1 and said.count("\n") == 1 and "unforeseen RuntimeError: something nobody [b]thought[/b] of" in said
    elsewhere = Path(said.rstrip(".\n").rsplit(" ", 1)[1])
    assert "Traceback" in elsewhere.read_text() and elsewhere.parent != folder and not list(folder.iterdir())
    elsewhere.unlink()
    (folder / "recipe.yaml").write_text("method: kd\n")
    code, _, said = call(capsys, *words)
    assert code == 1 and str(folder / "error.log") in said
    log = (folder / "error.log").read_text()
    assert "Traceback" in log and "broken" in log and SECRET not in log


def test_brackets_and_colons_in_names_are_printed_as_they_are(tmp_path, capsys, monkeypatch):
    from rich.table import Table

    from understudy.runs.progress import RichProgress

    table = Table("[b]head[/b]", title="[i]title[/i]")
    table.add_row("[red]cell[/red] :smile:")
    with out.capture() as shown:
        out.print("[b]name[/b] [/nothing]", highlight=False)
        out.print(table)
    for word in ("[b]name[/b] [/nothing]", "[b]head[/b]", "[i]title[/i]", "[red]cell[/red] :smile:"):
        assert word in shown.get()
    bar = RichProgress("kd on [b]data[/x]")
    task = bar.bar.add_task(bar.title, total=1)
    assert bar.bar.columns[0].render(bar.bar.tasks[task]).plain == "kd on [b]data[/x]"
    code, _, said = call(capsys, "train", "task=image_classification", f"data={tmp_path}/[b]x[/y]")
    assert code == 2 and "[b]x[/y]" in said


@pytest.mark.parametrize("number", ["inf", "nan", "-inf"])
def test_endless_numbers_of_options_are_refused(number, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("hello\n")
    generate = ("generate", tmp_path / "p.txt", "--model", "x", "--endpoint", "http://localhost:1/v1")
    for words in (
        *((*generate, f"--{name}={number}") for name in ("timeout", "rate", "temperature", "price-in", "cost-budget")),
        *(("plan", "seed=1", f"--{name}={number}") for name in ("rows", "peak", "memory")),
    ):
        code, _, said = call(capsys, *words)
        assert code == 2 and said.count("\n") == 1, words


def test_the_command_line_is_as_users_expect(capsys, monkeypatch):
    assert call(capsys, "--version") == (0, f"understudy {understudy.__version__}\n", "")
    for command in ("train", "check", "compare", "plan"):
        code, shown, said = call(capsys, command)
        assert code == 2 and "Usage: understudy " + command in shown and "Traceback" not in said
    code, _, said = call(capsys, "train", "--json")
    assert code == 2 and "Usage: give a YAML recipe" in said
    try:
        assert call(capsys, "--quiet", "methods")[1] == ""
        assert json.loads(call(capsys, "--quiet", "methods", "--json")[1])
    finally:
        out.quiet = False
        logging.getLogger().setLevel(logging.WARNING)
    assert "--install-completion" in call(capsys, "--help")[1]
    monkeypatch.setenv("_UNDERSTUDY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "understudy show kt")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert call(capsys)[1].split() == ["kto"]


def test_the_package_lists_its_public_names():
    assert set(dir(understudy)) >= {"InputError", "Method", "Term", "compare", "distill", "plan", "__version__"}
    assert all(hasattr(understudy, name) for name in dir(understudy))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_types_of_public_functions_are_known_outside(tmp_path):
    pytest.importorskip("mypy")
    home = Path(__file__).parent.parent
    (tmp_path / "mine.py").write_text(
        "import understudy\n\nreveal_type(understudy.distill)\nreveal_type(understudy.compare)\nresult = understudy.distill({})\n"
        "result.folder.exists()\nresult.nothing\n"
    )
    done = subprocess.run(  # with the configuration of `make lint`, and so with its cache, which saves two minutes
        [sys.executable, "-m", "mypy", str(tmp_path / "mine.py")], cwd=home, capture_output=True, text=True
    )
    assert '"Result" has no attribute "nothing"' in done.stdout, done.stdout + done.stderr
    assert "understudy.runs.comparison.Comparison" in done.stdout


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        *((v, "dpo", {"loss_type": v}) for v in ("kto", "simpo", "orpo", "ipo", "cpo", "hinge", "robust")),
        ("ranknet", "margin-mse", {"loss_type": "ranknet"}),
        ("reverse_kl", "kd", {"divergence": "reverse_kl"}),
        ("dpo", "dpo", {}),
    ],
)
def test_variants_have_names_of_their_own(name, method, options):
    assert resolve(name) == (method, options)
    task = {"dpo": "preferences", "margin-mse": "ranking", "kd": "image_classification"}[method]
    made = make({"task": task, "method": name})
    assert made.method == method and made.options == options
    assert make({"task": task, "method": name, "options": options}).options == options


def test_names_of_other_libraries_point_here():
    sigmoid = make({"task": "preferences", "method": "dpo", "options": {"loss_type": "sigmoid"}})
    assert sigmoid.build_method().loss_type == "dpo"
    with pytest.raises(InputError, match="leave one of them out"):
        make({"task": "preferences", "method": "kto", "options": {"loss_type": "ipo"}})
    with pytest.raises(InputError, match="'kto', 'cpo', 'simpo'"):
        make({"task": "preferences", "method": "dpo", "options": {"loss_type": "grpo"}})
    with pytest.raises(InputError, match=r"Did you mean 'simpo'.*variants: .*orpo"):
        make({"method": "simp"})


def test_every_key_is_listed_with_its_meaning(capsys):
    found = [key for keys in sections().values() for key in keys]
    own = {method.name for method in built_in()}  # a caller's own may leave its options without a description
    assert not [
        k for k in found if (not k.meaning or not k.type) and (not k.name.startswith("options.") or k.where in own)
    ]
    names = {key.name for key in found}
    assert {f"options.{n}" for method in all_methods().values() for n in method.model_fields} <= names
    assert {
        "data.max_length",
        "trainer.learning_rate",
        "on_policy.replay.size",
        "SIDE.endpoint.timeout",
        "seed",
    } <= names
    assert "trainer.neftune_noise_alpha" not in names and "`neftune_noise_alpha`" in page()
    assert next(k for k in found if k.name == "options.loss_type" and k.where == "dpo").type.startswith(
        "dpo or cdpo or robust"
    )
    assert "kd" in {k.where for k in matching("options.kd")} and {k.name for k in matching("data.max")} == {
        "data.max_length",
        "data.max_new_tokens",
    }
    assert all("ranking" in k.where for k in matching("data.ranking")) and matching("teacher.endpoint.timeout")
    code, shown, _ = call(capsys, "keys", "trainer.learning_rate", "--json")
    assert code == 0 and json.loads(shown)[0]["type"] == "number"
    code, _, said = call(capsys, "keys", "trainer.lerning_rate")
    assert code == 2 and "Did you mean 'trainer.learning_rate'" in said


def test_keys_of_data_are_all_described():
    """What the readers know is what `data` may hold, so that the list of known keys is the whole one."""
    assert set(KEYS) == set(TASKS)
    read = {
        "image_classification": images.OPTIONS,
        "image_generation": images.OPTIONS,
        "language_modeling": text.OPTIONS,
        "preferences": preferences.OPTIONS,
        "node_classification": graphs.OPTIONS,
        "ranking": retrieval_sources.OPTIONS,
        "text_classification": classified_texts.OPTIONS,
        "multimodal_classification": paired.OPTIONS,
        "conversation": conversations.OPTIONS,
        "vision_language": image_texts.OPTIONS,
    }
    for task, known in read.items():
        assert set(known) <= set(KEYS[task].model_fields), task
    for task in TASKS:  # what a task fills in is a key too, and within its range
        assert set(make({"task": task, "method": METHOD[task]}).data) <= set(KEYS[task].model_fields)
    with pytest.raises(
        InputError, match=r"Did you mean 'max_length'\? Known: .*max_length, .*truncation, .*vocab_size"
    ):
        make({"task": "language_modeling", "data": {"max_lenth": 3}})


METHOD = {
    **{"image_classification": "kd", "language_modeling": "kd", "node_classification": "kd", "preferences": "dpo"},
    **{
        "preference_world": "adpo",
        "image_generation": "boot",
        "scene_completion": "distillation-dpo",
        "ranking": "margin-mse",
        "reasoning": "sft",
        "text_generation": "symbolic-kd",
        "text_classification": "kd",
        "multimodal_classification": "kd",
        "conversation": "strategy-teaching",
        "vision_language": "kd",
        "statement_generation": "i2d2",
        "text_world": "kd",
    },
}


def test_pages_name_reproduce_where_there_is_a_claim():
    from understudy.catalogue import catalogue, find
    from understudy.claims import claims
    from understudy.pages import page as method_page

    for entry in catalogue():
        assert (f"understudy reproduce {entry.name}`" in method_page(entry)) == (entry.name in claims()), entry.name
    assert "understudy reproduce" not in method_page(find("sft")) and find("kto").name == "dpo"


def test_check_says_on_one_screen_what_is_read(tmp_path, capsys):
    rows = [{"prompt": f"say {i} ", "completion": f"number {i}", "extra": 1} for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = {**TEXT, "method": "kd", "data": {"name": str(tmp_path / "d.jsonl"), "max_length": 32, "vocab_size": 300}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    code, shown, said = call(capsys, "check", tmp_path / "r.yaml")
    assert code == 0, said
    assert len(shown.splitlines()) < 60
    for topic, says in {
        "files": r"d\.jsonl, [\d,]+ bytes",
        "columns": r"prompt, completion, extra \(of d\.jsonl\)",
        "splits": r"\d+ train, \d+ validation, \d+ test",
        "masks": r"\d+ of [\d,]+ tokens \(\d+%\) of the first \d+ training examples are trained on",
        "special tokens": r"eos \S+ \(\d+\)",
        "template": "no chat template",
        "teacher scores": "rows of every training batch, by llama.*, which is trained first",
    }.items():
        assert re.search(rf"^{topic} +.*{says}", shown, re.M), (topic, shown)
    code, shown, _ = call(capsys, "check", "task=image_classification", "method=sft", "teacher=mlp:4", "--json")
    found = json.loads(shown)["overview"]
    assert (
        "1 × 8 × 8" in found["processor"] and "uses no teacher" in found["teacher scores"] and "template" not in found
    )


@pytest.mark.parametrize(
    "task,method",
    [("image_classification", "kd"), ("preferences", "sft"), ("image_generation", "denoise"), ("ranking", "sft")],
)
def test_a_task_without_a_method_has_one_that_works_on_it(task, method):
    assert make({"task": task}).method == method


def test_the_command_of_every_page_and_every_task_without_a_method_is_a_recipe():
    from understudy.cli.options import load_recipe
    from understudy.pages import command

    for method in built_in():
        recipe = load_recipe(None, shlex.split(command(method))[2:])
        assert recipe.method == method.name, method.name
    for name, task in TASKS.items():
        assert task.kinds & all_methods()[make({"task": name}).method].kinds, name


def test_keys_of_a_side_without_a_model_are_of_the_tasks_own():
    """As `cache capture` says: train from it with teacher.cache=FOLDER."""
    plain, made = (
        make({"task": "node_classification"}),
        make({"task": "node_classification", "teacher": {"cache": "here"}}),
    )
    assert made.teacher == plain.teacher.model_copy(update={"cache": "here"}) and made.student == plain.student
    assert make({"student": {"dtype": "bfloat16"}}).student.dtype == "bfloat16"
    with pytest.raises(
        InputError, match=r"teacher.cache is of no model: the recipe has no teacher. Name teacher.model"
    ):
        make({"task": "language_modeling", "method": "sft", "teacher": {"cache": "here"}})
    with pytest.raises(InputError, match=r"Unknown recipe key: 'teacher.modl'. Did you mean 'model'"):
        make({"teacher": {"modl": "here"}})


def test_what_does_not_go_together_is_said_without_all_values():
    with pytest.raises(InputError, match=r"^Bad option of method 'llava-mod': top_k is 9"):
        make({"task": "preferences", "method": "llava-mod", "options": {"top_k": 9}})
    with pytest.raises(InputError, match=r"^Bad option of method 'mst-distill': shares is \[1.0, 2.0, 0.0\]: parts"):
        make({"task": "multimodal_classification", "method": "mst-distill", "options": {"shares": [1, 2, 0]}})
    with pytest.raises(InputError, match=r"of the tasks text_generation\.$"):
        make({"method": "symbolic-kd"})
    with pytest.raises(InputError, match=r"should be a list"):
        make({"task": "reasoning", "method": "arte", "options": {"shots": 3}})


@pytest.mark.parametrize(
    "command,says",
    [
        ("method=arte task=language_modeling", "checks final answers and task 'language_modeling' has none"),
        ("method=mcts-dpo task=reasoning options.judge_prompt=nofile", "nofile"),
        ("method=ded task=reasoning options.temperature=0", "are all alike: raise the temperature"),
        ("method=qcrd task=reasoning options.teacher_prompt=nofile", "nofile"),
        ("method=symbolic-kd task=text_generation options.tail_prompt=nofile", "nofile"),
        ("method=i2d2 task=statement_generation options.prompt=nofile", "nofile"),
        ("method=i2d2 task=statement_generation options.log=other.jsonl", "the run's own does: leave it out"),
        ("method=frontier-synthetic task=language_modeling data.characters=20000", "task 'language_modeling' has none"),
    ],
)
def test_the_check_of_a_procedure_says_what_its_run_would(capsys, command, says):
    code, _, said = call(capsys, "check", *command.split())
    assert code == 2 and says in said


def test_the_overview_names_the_tokens_at_both_ends_and_calls_no_graph_an_image(tmp_path, capsys):
    from understudy.data.retrieval_batches import train_encoder_tokenizer
    from understudy.runs.overview import _special_tokens

    said = _special_tokens(train_encoder_tokenizer(["the cat sat"] * 9, 300))
    assert said.endswith("the tokenizer adds cls [CLS] and sep [SEP] by itself")
    data = ["task=node_classification", "method=sft", f"output={tmp_path}"]
    code, shown, _ = call(capsys, "check", *data, "--json")
    assert code == 0 and "processor" not in json.loads(shown)["overview"]


@pytest.mark.parametrize("value", [0, "0", 0.0])
def test_no_steps_at_all_are_refused_and_do_not_become_all_epochs(value):
    with pytest.raises(InputError, match=r"trainer\.max_steps = 0: .* trains all epochs\. Give 1 or more"):
        checked_arguments({"max_steps": value}, "trainer")
    assert checked_arguments({"max_steps": -1}, "trainer") == {"max_steps": -1}
