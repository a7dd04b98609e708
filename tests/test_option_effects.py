"""Options that have an effect only with some values of another one are refused elsewhere, unless they are the default."""

from typing import get_args

import pytest

from understudy.errors import InputError
from understudy.methods import all_methods
from understudy.pages import command
from understudy.runs.recipe import make

METHODS = {name: method for name, method in all_methods().items() if method.used_with}


@pytest.mark.parametrize("name", METHODS)
def test_every_rule_is_about_options_that_there_are(name):
    method = METHODS[name]
    for option, others in method.used_with.items():
        field = method.model_fields[option]
        assert others and field.default == method.model_fields[option].get_default()
        for other, values in others.items():
            known = method.model_fields[other]
            said = getattr(known.annotation, "__args__", ())
            names = {n for part in said for n in getattr(part, "__args__", (part,))}
            assert set(values) <= names, (option, other)
            assert set(values) != names, (option, other)


@pytest.mark.parametrize(
    "name,options,says",
    [
        ("kd", {"beta": 0.3}, "beta has no effect with divergence=forward_kl; it belongs to jsd"),
        ("kd", {"alpha": 0.3, "divergence": "jsd"}, "it belongs to skew_kl, skew_reverse_kl"),
        ("kd", {"ab": (0.5, 0.5)}, "it belongs to alpha_beta"),
        ("pld", {"temperature": 2.0, "weights": "uniform"}, "temperature has no effect with weights=uniform"),
        ("adpo", {"decay": 0.5}, "decay has no effect with anchor=fixed; it belongs to ema"),
        ("adpo", {"beta_reward": 1.0, "target": "best"}, "beta_reward has no effect with target=best"),
        ("adpa", {"rejected_weight": 1.0}, "rejected_weight has no effect with objective=adpa; it belongs to dckd"),
        ("adpa", {"gamma": 1.0, "objective": "dckd"}, "gamma has no effect with objective=dckd; it belongs to adpa"),
        ("lightgen", {"beta": 10.0, "refine": "sft"}, "beta has no effect with refine=sft"),
        ("llava-mod", {"detach_kl": True}, "detach_kl has no effect with loss_type=sigmoid"),
        ("lelp", {"beta": 1.0, "split": "random"}, "beta has no effect with split=random"),
        ("distillation-dpo", {"voxel": 0.1}, "voxel has no effect with metric=None; it belongs to jsd, iou"),
        ("arte", {"draft_choice": "first"}, "draft_choice has no effect with align=both; it belongs to none"),
    ],
)
def test_options_without_effect_are_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        all_methods()[name](**options)


def test_they_are_taken_where_they_have_one_and_where_they_are_the_default():
    known = all_methods()
    known["kd"](divergence="jsd", beta=0.3)
    known["kd"](divergence="reverse_kl", beta=0.5, alpha=0.1, ab=(0.2, 0.7))
    known["adpo"](target="plackett_luce", top=3, label_smoothing=0.1, poly=1.0)
    resolved = known["adpo"](anchor="ema", decay=0.5).model_dump()
    assert known["adpo"](**resolved).model_dump() == resolved


BY_KIND = {name: method for name, method in all_methods().items() if method.value_kinds}


@pytest.mark.parametrize("name", BY_KIND)
def test_values_of_options_that_work_on_some_tasks_alone(name):
    """The rules are about values that there are and kinds that the method has, some value is left on each kind, and the
    command on the method's page is not refused."""
    method = BY_KIND[name]
    for option, kinds in method.value_kinds.items():
        known = set(get_args(method.model_fields[option].annotation))
        assert set(kinds) < known
        assert all(on and on < method.kinds for on in kinds.values())
    values = dict(word.split("=") for word in command(method).strip("`").split()[2:])
    assert make(values).method == name


@pytest.mark.parametrize("task", ["image_classification", "text_classification"])
def test_a_value_is_refused_on_a_task_that_it_does_not_work_on(task):
    says = "^options.score=detector works on text tasks and '{}' is an? .* task: set options.score to memorisation or domains"
    data = {"name": "topics"} if task == "text_classification" else {}
    recipe = {"task": task, "data": data, "method": "swing", "options": {}}
    for options in ({}, {"score": "detector"}):
        with pytest.raises(InputError, match=says.format(task)) as caught:
            make({**recipe, "options": options})
        assert "\n" not in str(caught.value)
    assert make({**recipe, "options": {"score": "memorisation"}}).options == {"score": "memorisation"}


def test_a_recipe_says_it_in_one_line():
    with pytest.raises(InputError, match="beta has no effect with divergence=forward_kl") as caught:
        make({"task": "image_classification", "method": "kd", "options": {"beta": 0.3}})
    assert "\n" not in str(caught.value)
