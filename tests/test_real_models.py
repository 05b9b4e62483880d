"""Models that others trained or computed: our code must give their published numbers and words.

They are data, not part of this repository; where the folder `shared` is not beside it, nothing can be compared.
"""

import base64
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from minillm import functional as F
from minillm.generate import generate
from minillm.model import GPT2, Config
from minillm.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
converter = runpy.run_path(str(ROOT / "scripts" / "convert_llama2c.py"))
read_model, read_tokenizer = converter["read_model"], converter["read_tokenizer"]
SHARED = ROOT.parent / "shared"
MODELS = SHARED / "data" / "models"
pytestmark = pytest.mark.skipif(not MODELS.exists(), reason="the published models are not beside this checkout")

# ------------------------------------------------------------------ stories260K


@pytest.fixture(scope="module")
def stories():
    folder = MODELS / "stories260K"
    model = read_model(folder / "stories260K.bin")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(read_tokenizer(folder / "tok512.bin", 512)))
    return model, tokenizer, json.loads((folder / "reference.json").read_text())


def test_stories260k_tells_its_published_story_byte_for_byte(stories):
    model, tokenizer, reference = stories
    expected = reference["greedy_from_bos_ids"]
    (out,) = generate(model, [expected[:1]], max_new_tokens=len(expected) - 1, temperature=0)
    assert out.ids.tolist() == expected[1:]
    published = (MODELS / "stories260K" / "expected_greedy_200.txt").read_bytes()
    assert tokenizer.decode(out.ids.tolist()).encode() == published
    assert len(published) == 464


def test_stories260k_through_our_tokenizer(stories, tmp_path):
    """A SentencePiece vocabulary with bytes to fall back on, as Llama 2's and Mistral's are."""
    _, backend, reference = stories
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = Tokenizer.load(tmp_path)
    published = (MODELS / "stories260K" / "expected_greedy_200.txt").read_bytes()
    assert tokenizer.decode(reference["greedy_from_bos_ids"], skip_special=True).encode() == published
    stream, told = tokenizer.decoder(skip_special=True), []
    for token in reference["greedy_from_bos_ids"]:
        told.append(stream.push(token))
    assert ("".join(told) + stream.flush()).encode() == published
    for text in ("Once upon a time", " two  blanks ", "caf\u00e9 \U0001f642\n", "<s></s><0x0A>", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids.tolist()) & set(tokenizer.special_tokens.values())


def test_stories260k_logits_and_likelihoods(stories):
    model, tokenizer, reference = stories
    for case in reference["cases"]:
        ids = np.array([case["ids"]])
        assert [1, *tokenizer.encode(case["prompt"]).ids] == case["ids"]
        logits = model(ids).data[0, -1]
        assert np.abs(logits - np.array(case["last_logits"])).max() < 2e-5
        if case["nll_per_token"] is not None:
            nll = -F.token_logprobs(model(ids[:, :-1]).data, ids[:, 1:]).data
            assert abs(nll.mean() - case["nll_per_token"]) < 1e-5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:20], "20 bytes, fewer than its header"),
        (lambda data: b"\0" * 28 + data[28:], "its header is"),
        (lambda data: data[:200_000], "ends in the middle of"),
    ],
)
def test_a_broken_checkpoint_is_named(spoil, message, tmp_path):
    path = tmp_path / "broken.bin"
    path.write_bytes(spoil((MODELS / "stories260K" / "stories260K.bin").read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_model(path)


# ------------------------------------------------------------------ GPT-2's kind


def base64_arrays(values):
    return {
        name: np.frombuffer(base64.b64decode(v["data"]), "<f4").reshape(v["shape"])
        for name, v in values.items()
        if isinstance(v, dict) and "data" in v
    }


def gpt2_config(c, context, **rest):
    sizes = {"num_hidden_layers": c["n_layer"], "num_attention_heads": c["n_head"], "hidden_size": c["n_embd"]}
    return Config(**sizes, vocab_size=c["vocab_size"], max_position_embeddings=context, architecture="gpt2", **rest)


@pytest.fixture(scope="module")
def nano_sort():
    """The model, with one position more than its training needed, so that the sixth digit can be sampled too."""
    stored = json.loads((MODELS / "nano_sort" / "gpt-nano-sort-model.json").read_text())
    model = GPT2(gpt2_config(stored["config"], stored["config"]["block_size"] + 1, tie_word_embeddings=False))
    arrays = {name: a for name, a in base64_arrays(stored).items() if name in model.parameters}
    arrays["transformer.wpe.weight"] = np.pad(arrays["transformer.wpe.weight"], ((0, 1), (0, 0)))
    linear = ("c_attn.weight", "c_fc.weight", "c_proj.weight")  # minGPT stores these (out, in), GPT-2 (in, out)
    model.load_state_dict({name: a.T if name.endswith(linear) else a for name, a in arrays.items()})
    return model


def test_nano_sort_and_its_intermediates(nano_sort):
    partials = json.loads((MODELS / "nano_sort" / "gpt-nano-sort-t0-partials.json").read_text())
    model, expected = nano_sort, base64_arrays(partials)
    ids = expected["idx"].astype(np.int64)
    x = model._embed(ids, np.zeros(ids.shape, np.int32), 0)
    assert np.abs(x.data - expected["x"]).max() < 1e-5
    for layer in range(3):
        x = model._run_block(layer, x, np.zeros(ids.shape, np.int32), 0, None)
        assert np.abs(x.data - expected[f"block{layer}"]).max() < 1e-5
    assert np.abs(model._final_norm(x).data - expected["ln_f"]).max() < 1e-5
    assert np.abs(model(ids).data - expected["lm_head"]).max() < 1e-5
    assert np.abs(F.softmax(model(ids)).data - expected["probs"]).max() < 1e-5


def test_nano_sort_sorts(nano_sort):
    """It reads six digits of 0, 1, 2 and writes them sorted: all 729 inputs."""
    inputs = np.array(np.meshgrid(*[range(3)] * 6)).reshape(6, -1).T
    out = generate(nano_sort, inputs, max_new_tokens=6, temperature=0)
    right = np.mean([np.array_equal(o.ids, np.sort(i)) for o, i in zip(out, inputs, strict=True)])
    assert right > 0.99


def test_tiny_random_gpt2():
    expected = json.loads((MODELS / "tiny_random_gpt2" / "expected.json").read_text())
    stored = np.load(MODELS / "tiny_random_gpt2" / "weights.npz")
    model = GPT2(gpt2_config(expected["config"], expected["config"]["n_ctx"]))
    model.load_state_dict({name: stored[name] for name in model.parameters})
    assert np.array_equal(stored["lm_head.weight"], stored["transformer.wte.weight"])  # tied indeed
    logits = model(np.array(expected["input_ids"])).data.reshape(-1)[::200]
    published = np.array(expected["prompt_logits_every_200th_of_flattened_2x4x1000"])
    assert np.abs(logits - published).max() < 1e-5
