import json

import numpy as np
import pytest

from minillm.hub import config_of, load_pretrained, save_pretrained
from minillm.model import Config, build

SIZES = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)
KINDS = {
    "Llama": {"num_key_value_heads": 1},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {"attention_bias": True},
    "Qwen3": {"qk_norm": True, "head_dim": 12},
    "GPT2": {"architecture": "gpt2"},
}


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_from_its_folder(kind, head, tmp_path):
    model = build(Config(**SIZES, **KINDS[kind], head=head), seed=1)
    again = load_pretrained(save_pretrained(model, tmp_path))
    assert again.config == model.config and np.array_equal(again.flat, model.flat)
    (name,) = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert name.startswith(kind) and name.endswith("ForSequenceClassification") == (head == "scalar")


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    model = build(Config(**SIZES, head="scalar"))
    values = json.loads((save_pretrained(model, tmp_path) / "config.json").read_text())
    for change in ({"num_labels": 3}, {"num_labels": None, "id2label": {"0": "a", "1": "b"}}):
        broken = {key: value for key, value in (values | change).items() if value is not None}
        with pytest.raises(ValueError, match="a reward model has one label, and this has"):
            config_of(broken)
    with pytest.raises(ValueError, match="architecture 'BertForSequenceClassification' is not supported"):
        config_of(values | {"architectures": ["BertForSequenceClassification"]})
