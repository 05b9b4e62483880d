"""Hugging Face's transformers reads our folders and computes, says and masks the same; and we read what it saves.

It is not among what the tests need: without it, and torch, nothing here runs.
"""

import numpy as np
import pytest

from minillm.chat import TEMPLATES, render, stop_ids
from minillm.generate import generate
from minillm.hub import load_pretrained, save_pretrained
from minillm.model import Config, build
from minillm.optim import AdamW
from minillm.tokenizer import Tokenizer
from minillm.trainers.common import next_token_loss, pad, save_model, scores

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you, Größe 🙂?"},
    {"role": "assistant", "content": "A small model.\nAnd you?"},
    {"role": "user", "content": "Its maker."},
    {"role": "assistant", "content": "Glad to meet you!"},
]
TOKENIZER = Tokenizer.train([message["content"] for message in TALK] * 9, 320)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SIZES = {
    "vocab_size": TOKENIZER.vocab_size + 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
KINDS = {
    "Llama": {"num_key_value_heads": 2},
    "Llama linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "head_dim": 12},
    "Llama llama3": {"rope_scaling": {"rope_type": "llama3"} | LLAMA3, "tie_word_embeddings": False},
    "Mistral": {"sliding_window": 9, "num_key_value_heads": 2},
    "Mistral without a window": {"sliding_window": 256},
    "Qwen2": {"attention_bias": True, "num_key_value_heads": 1, "rope_theta": 1e6},
    "Qwen2 window": {"attention_bias": True, "sliding_window": 9, "window_layers": (1,)},
    "Qwen3": {"qk_norm": True, "head_dim": 24, "num_key_value_heads": 2},
    "Qwen3 window": {"qk_norm": True, "sliding_window": 9},
    "GPT2": {"architecture": "gpt2"},
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """(model, folder): a model that has nearly learnt one conversation by heart, and where it is saved."""
    model = build(Config(**SIZES | KINDS[request.param]), seed=3)
    optimizer, batch = AdamW(model.parameters, 1e-2), pad(*zip(render(TALK, "chatml", TOKENIZER), strict=False), 0)
    for _ in range(200):  # how many it takes depends on the processor's roundings
        loss = next_token_loss(model, batch, int(batch.mask.sum()))
        if loss.item() < 0.9:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.9
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, model, TOKENIZER, "chatml")
    return model, folder


def theirs(folder, kind=transformers.AutoModelForCausalLM, **options):
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids), dtype=torch.long)).logits.numpy()


def test_logits(trained):
    model, folder = trained
    ids = np.random.default_rng(0).integers(0, TOKENIZER.vocab_size, (3, 90))
    expected = model(ids).data
    error = np.abs(logits_of(theirs(folder), ids) - expected).max()
    print(f"largest difference of logits: {error:.1e}, of up to {np.abs(expected).max():.1f}")
    assert error < 1e-4
    other = load_pretrained(folder)
    other.flat[0] += 0.01  # this test can fail
    assert np.abs(other(ids).data - expected).max() > 1e-3


def test_several_files_in_bfloat16(trained, tmp_path):
    model, _ = trained
    save_pretrained(model, tmp_path, dtype="bfloat16", max_shard_size=8000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = np.random.default_rng(1).integers(0, TOKENIZER.vocab_size, (2, 30))
    assert np.abs(logits_of(theirs(tmp_path), ids) - load_pretrained(tmp_path)(ids).data).max() < 1e-4


def test_greedy_text_ends_where_ours_does(trained):
    model, folder = trained
    other, words = theirs(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for length in (2, 4):
        prompt = words.apply_chat_template(
            TALK[:length], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids, _ = render(TALK[:length], "chatml", TOKENIZER, add_generation_prompt=True)
        assert prompt["input_ids"][0].tolist() == ids.tolist()
        made = other.generate(**prompt, max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
        (ours,) = generate(model, [ids], max_new_tokens=40, temperature=0, stop_tokens=stop_ids("chatml", TOKENIZER))
        assert made == ours.ids.tolist()
        assert words.decode(made) == TOKENIZER.decode(made)
        if ours.finish == "stop":
            assert made[-1] == TOKENIZER.special_tokens["<|im_end|>"]
    batch = words([TOKENIZER.decode(ids)] * 2, return_tensors="pt")  # every key is one that the model takes
    assert other.generate(**batch, max_new_tokens=2, do_sample=False).shape[0] == 2


def test_we_read_what_they_save(trained, tmp_path):
    model, folder = trained
    theirs(folder).save_pretrained(tmp_path, max_shard_size="30KB")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config == model.config and np.array_equal(again.flat, model.flat)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_tokens == TOKENIZER.special_tokens
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.pad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_models_scores(kind, tmp_path):
    """In a padded batch: they look for the last token that is not padding."""
    model = build(Config(**SIZES | KINDS[kind], head="scalar"), seed=5)
    save_model(tmp_path, model, TOKENIZER, "chatml")
    sequences = [render(TALK[:length], "chatml", TOKENIZER)[0] for length in (3, 5)]
    other = theirs(tmp_path, transformers.AutoModelForSequenceClassification)
    masks = [np.ones(len(ids), bool) for ids in sequences]
    batch = pad(sequences, masks, TOKENIZER.pad_id).tokens
    expected = scores(model, list(zip(sequences, masks, strict=True)), TOKENIZER.pad_id).data
    with torch.no_grad():
        ids = torch.tensor(batch, dtype=torch.long)
        found = other(ids, attention_mask=(ids != TOKENIZER.pad_id).long()).logits[:, 0].numpy()
    assert np.abs(found - expected).max() < 1e-4 < abs(expected[0] - expected[1])


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_and_mask_of_a_conversation(template, tmp_path):
    """With a tokenizer that has no token across the border of an answer, where we cut the text and they do not."""
    save_model(tmp_path, build(Config(**SIZES)), TOKENIZER, template)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for length in range(2, len(TALK) + 1):
        found = words.apply_chat_template(TALK[:length], return_assistant_tokens_mask=True, return_dict=True)
        ids, mask = render(TALK[:length], template, TOKENIZER)
        assert words.decode(found["input_ids"]) == TOKENIZER.decode(ids)
        assert found["input_ids"] == ids.tolist()
        assert found["assistant_masks"] == mask.astype(int).tolist()
        if TALK[length - 1]["role"] == "user":
            prompt = words.apply_chat_template(TALK[:length], add_generation_prompt=True, return_dict=True)
            expected, _ = render(TALK[:length], template, TOKENIZER, add_generation_prompt=True)
            assert prompt["input_ids"] == expected.tolist()
