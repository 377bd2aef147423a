"""Every recipe that ships: found, read, sound, one screen, and about a model whose public shape stands here."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from align.recipe.file import load_recipe
from align.recipe.graph import recipe_warnings, topological_order
from align.recipe.settings import DataSettings

FOLDER = Path(__file__).parents[1] / "recipes"

# What the hub's config.json of each model says (as of 2026); no hub is needed to plan with it.
CONFIGS = {
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "parameters": 134.5e6,
    },
    "Qwen/Qwen3-0.6B-Base": {
        "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "parameters": 596.0e6,
    },
    "google/gemma-3-1b-pt": {
        "model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 6912, "vocab_size": 262144,
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "parameters": 999.9e6,
    },
    "meta-llama/Llama-3.2-1B-Instruct": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "parameters": 1235.8e6,
    },
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936,
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "parameters": 1543.7e6,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "parameters": 7615.6e6,
    },
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, "parameters": 8030.3e6,
    },
}  # fmt: skip

# Columns of the public data sets that the recipes read, as their cards give them: (splits, columns).
HUB_DATA = {
    "HuggingFaceTB/smol-smoltalk": ({"train", "test"}, {"messages", "source"}),
    "HuggingFaceTB/smoltalk": ({"train", "test"}, {"messages"}),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {"train_prefs", "test_prefs", "train_sft", "test_sft", "train_gen", "test_gen"},
        {"prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"},
    ),
    "Anthropic/hh-rlhf": ({"train", "test"}, {"chosen", "rejected"}),
    "Skywork/Skywork-Reward-Preference-80K-v0.2": ({"train"}, {"chosen", "rejected", "source"}),
}
SMOLTALK_SUBSETS = {"all", "everyday-conversations", "smol-magpie-ultra"}

FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".yaml", ".yml"))
# A recipe has stages; other YAML files (judges, constitutions) may lie beside.
RECIPES = [path for path in FILES if "stages" in yaml.safe_load(path.read_text(encoding="utf-8"))]
# The others start from a folder that ships with the project.
HUB_RECIPES = [path for path in RECIPES if not (FOLDER / load_recipe(path).model).exists()]


def test_every_shipped_recipe_is_found():
    assert len(HUB_RECIPES) == 7
    assert len(HUB_RECIPES) == len(CONFIGS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_it_is_sound_and_every_data_set_is_used(path):
    recipe = load_recipe(path)
    assert len(topological_order(recipe)) == len(recipe.stages)
    assert recipe_warnings(recipe) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_it_opens_with_its_command_and_fits_one_screen(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"# align run recipes/{path.name}")
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("path", HUB_RECIPES, ids=lambda path: path.name)
def test_it_says_what_hardware_it_needs(path):
    head = path.read_text(encoding="utf-8").partition("name:")[0]
    assert "one GPU" in head
    assert "GB" in head


def test_names_differ_so_that_their_checkpoints_do():
    names = [load_recipe(path).name for path in RECIPES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", HUB_RECIPES, ids=lambda path: path.name)
def test_its_model_is_one_whose_shape_is_known(path):
    recipe = load_recipe(path)
    context = CONFIGS[recipe.model]["max_position_embeddings"]
    assert all((getattr(stage, "max_length", None) or 0) <= context for stage in recipe.stages.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shapes_give_the_published_number_of_weights(name):
    config = CONFIGS[name]
    hidden, width = (
        config["hidden_size"],
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    )
    query, key = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    block = 2 * hidden * query + 2 * hidden * key + 3 * hidden * config["intermediate_size"]
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    total = config["num_hidden_layers"] * block + embeddings
    assert total == pytest.approx(config["parameters"], rel=2e-3)  # norms and biases are left out


@pytest.mark.parametrize("path", HUB_RECIPES, ids=lambda path: path.name)
def test_its_public_data_have_what_it_asks_for(path):
    for settings in load_recipe(path).data.values():
        if settings.path in HUB_DATA:
            check_hub_data(settings)
        elif settings.path is not None:
            assert settings.path.startswith("../data/your")


def check_hub_data(settings: DataSettings) -> None:
    splits, columns = HUB_DATA[str(settings.path)]
    assert settings.split in splits
    needed = {"messages": {"messages"}, "preferences": {"chosen", "rejected"}, "prompts": {"chosen", "rejected"}}
    assert needed[settings.format] <= columns  # prompts are taken from rows of any other format, here from hh pairs
    assert (settings.subset in SMOLTALK_SUBSETS) == (settings.path == "HuggingFaceTB/smoltalk")
