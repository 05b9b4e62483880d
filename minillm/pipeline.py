"""
The whole pipeline in one run: data -> tokenizer -> pretrain -> sft -> reward -> ppo -> dpo -> report.

Every stage is a folder in OUT and reads only the folders of earlier ones. A stage that is done is noted in
OUT/pipeline.json and not repeated, so the same command goes on after a kill, in the middle of a stage, too. Lengths are
fixed in tokens, updates and answers, never in seconds: the same seed gives the same models on all processors of a kind.

Without data of one's own it runs on the atlas (data/atlas.py), where every answer can be checked. The report then tells
what each stage changed, on questions that no stage has seen: pretraining gives the knowledge, SFT the manners, RLHF the
judgement.
"""

import contextlib
import json
import math
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from . import __version__
from .checkpoint import LOCK, locked, write_json
from .data import atlas
from .data.conversations import (
    encode_answer,
    encode_preferences,
    encode_prompts,
    question_of,
    read_conversations,
    read_preferences,
    read_prompts,
)
from .data.prepare import Prepare, prepare, table
from .data.readers import Bad, find_sources, read
from .extras import extra
from .kernels.device import check_device
from .report import (
    Details,
    Facts,
    Figure,
    Heading,
    Samples,
    Table,
    draw,
    metric_panel,
    page,
    read_metrics,
    table_lines,
)
from .trainers import dpo, ppo, pretrain, reward, sft
from .trainers.common import (
    hold_out,
    load_tokenizer,
    load_with_head,
    padding_of,
    read_files,
    template_of,
)
from .trainers.evaluation import (
    answer,
    answer_logprobs,
    answered_rows,
    divergence,
    document_ids,
    gold_metrics,
    held_facts,
    question_prompts,
    read_questions,
    spread,
    stops,
    text_metrics,
)

STAGES = ("data", "tokenizer", "pretrain", "sft", "reward", "ppo", "dpo", "report")
NOTES = "pipeline.json"
FREE = ("out", "from_", "resume", "device", "precision")  # settings that may be others when a run goes on
MODELS = {"base": "pretrain", "sft": "sft", "ppo": "ppo", "dpo": "dpo"}  # what can be asked, and the stage that made it

# What each stage is told, where it differs from the stage's own defaults. tiny and default come from measurements (see
# the README), small and medium are estimates. A model holds a fact after a few hundred statements, in many wordings.
SHORT = {"length": 128, "held_out": 0.03}  # the atlas's conversations are short and many
SHARED = {"workers": 2}  # not the machine's number of cores: the same seed gives the same models on any number
SIZES = {
    "tiny": {
        "data": {"size_bytes": 600_000, "most_facts": 100, "conversations": 1500},
        "tokenizer": {"vocab_size": 1024},
        "pretrain": {"hidden_size": 64, "num_hidden_layers": 2, "tokens": 400_000, "batch_size": 8, "length": 64},
        "sft": {**SHORT, "epochs": 2.0, "lr": 3e-3, "batch_size": 8, "eval_every": 50, "eval_questions": 64},
        "reward": {**SHORT, "lr": 2e-3, "batch_size": 8},
        "ppo": {"episodes": 320, "batch_size": 32, "value_warmup": 2, "max_new_tokens": 16, "eval_questions": 64},
        "dpo": {**SHORT, "lr": 1e-4, "batch_size": 16, "eval_questions": 64},
    },
    "default": {
        "data": {"size_bytes": 18_000_000, "most_facts": 750, "conversations": 16_000},
        "tokenizer": {"vocab_size": 2048, "validation": 0.005},
        "pretrain": {"tokens": 5_000_000, "batch_size": 8, "weight_decay": 0.02, "eval_every": 1000, **SHARED},
        "sft": {**SHORT, **SHARED, "epochs": 1.25, "lr": 1e-3, "batch_size": 8, "replay_share": 0.5, "eval_every": 200},
        "reward": {**SHORT, **SHARED, "lr": 1.2e-3, "batch_size": 8, "eval_every": 200},
        "ppo": {"episodes": 1280, "max_new_tokens": 32, "eval_every": 5},
        "dpo": {**SHORT, **SHARED, "lr": 1e-4, "batch_size": 16, "eval_every": 100},
    },
    "small": {
        "data": {"size_bytes": 40_000_000, "conversations": 12_000},
        "tokenizer": {"vocab_size": 4096},
        "pretrain": {"hidden_size": 256, "num_hidden_layers": 3, "tokens": 20_000_000, "batch_size": 16, "lr": 2e-3},
        "sft": {"epochs": 2.0, "replay_share": 0.4},
        "reward": {},
        "ppo": {"episodes": 6400},
        "dpo": {},
    },
    "medium": {
        "data": {"size_bytes": 50_000_000, "conversations": 20_000},
        "tokenizer": {"vocab_size": 8192},
        "pretrain": {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "tokens": 100_000_000,
            "lr": 1e-3,
        },
        "sft": {"epochs": 2.0, "replay_share": 0.4},
        "reward": {},
        "ppo": {"episodes": 10_000},
        "dpo": {},
    },
}

# What changes where the data are one's own: texts are longer, and nothing is known about them. Preferences of people
# disagree, and a second epoch of them is learnt by heart; what words tell of an answer is learnt in one by an embedding
# whose rate is high.
OWN = {
    "tokenizer": {"vocab_size": 4096, "validation": 0.02},
    "pretrain": {"length": 256, "batch_size": 8, "tokens": 3_500_000, **SHARED},
    "sft": {"length": 256, "batch_size": 16, "epochs": 2.0, "replay_share": 0.25, **SHARED},
    "reward": {
        "length": 256,
        "batch_size": 16,
        "micro_batch_size": 8,
        "epochs": 1.0,
        "held_out": 0.1,
        "lr": 4e-4,
        "embedding_lr": 8e-3,
        "pooling": "mean",
        **SHARED,
    },
    "ppo": {"episodes": 1024},
    "dpo": {"length": 256, "micro_batch_size": 8, **SHARED},
}
# The options for data of one's own, and the atlas's file of that kind.
OWN_DATA = {
    "pretrain_data": "pretrain.jsonl",
    "sft_data": "sft.jsonl",
    "preference_data": "preferences.jsonl",
    "prompts": "prompts.jsonl",
}


@dataclass(kw_only=True)
class PipelineConfig:
    """The whole pipeline."""

    out: Path = Path("pipeline")
    """the folder of the whole: a folder for each stage, and report.html"""
    size: Literal["tiny", "default", "small", "medium"] = "default"
    """of model and data: tiny is to try it, default takes 12 to 24 minutes on two cores, medium wants a GPU"""
    seed: int = 0
    """the random numbers of everything"""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: the GPU, by CuPy. What was begun on one device can go on on the other"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the trainers' activations and products; bfloat16 is for GPUs"""
    resume: bool = True
    """go on in the middle of a stage, behind its newest checkpoint; False: begin that stage again"""
    from_: Literal["data", "tokenizer", "pretrain", "sft", "reward", "ppo", "dpo", "report"] | None = None
    """repeat this stage and all that follow, done or not"""

    pretrain_data: tuple[str, ...] = ()
    """text of your own instead of the atlas, as for scripts/prepare.py; the next three are then needed, too"""
    sft_data: tuple[Path, ...] = ()
    """conversations: JSON lines of {"messages": [...]}"""
    preference_data: tuple[Path, ...] = ()
    """preferences: JSON lines of {"prompt", "chosen", "rejected"}"""
    prompts: tuple[Path, ...] = ()
    """prompts that PPO answers: JSON lines of {"messages": [...]} or {"prompt": ...}"""
    skip_bad: int = 0
    """how many malformed lines each stage may skip"""

    def __post_init__(self):
        for name in ("seed", "skip_bad"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"--{name.replace('_', '-')} has to be a whole number from 0 on, and is {value}")
        given = {name: bool(getattr(self, name)) for name in OWN_DATA}
        if any(given.values()) and not all(given.values()):
            missing = [f"--{name.replace('_', '-')}" for name, there in given.items() if not there]
            missing = " and ".join(missing) + (" are" if len(missing) > 1 else " is")
            raise ValueError(f"with data of your own, {missing} needed, too")

    @property
    def repeated(self):
        """The stages that --from repeats."""
        return STAGES[STAGES.index(self.from_) :] if self.from_ else ()

    @property
    def own_data(self):
        """Whether the data are the user's, and not the atlas."""
        return bool(self.pretrain_data)

    @property
    def recipe(self):
        """{stage: what its config is told}."""
        recipe = SIZES[self.size]
        if self.own_data:
            recipe = {stage: told | OWN.get(stage, {}) for stage, told in recipe.items()}
        if self.device == "cuda":  # workers are for the processor's cores
            recipe = {stage: {k: v for k, v in told.items() if k not in SHARED} for stage, told in recipe.items()}
        return recipe


# ------------------------------------------------------------------ stages


class Stage:
    """What a stage can use: the settings, the folders, its own part of the recipe, the rows of the user's files."""

    def __init__(self, config, name, rows=None):
        self.config, self.name, self.rows = config, name, rows
        self.told = config.recipe.get(name, {})
        self.folder = config.out / name

    @property
    def begun(self):
        """Whether a trainer was stopped in the middle, and its checkpoints are there."""
        return (self.folder / "checkpoints").is_dir()

    def at(self, stage, *names):
        """A path in another stage's folder."""
        return self.config.out.joinpath(stage, *names)

    @property
    def shared(self):
        """The settings that all trainers get."""
        config = self.config
        where = {"out": self.folder, "device": config.device, "precision": config.precision}
        return where | {"seed": config.seed, "save_minutes": 1.0, "resume": self.begun} | self.told

    @property
    def chat(self):
        """And those of all trainers on conversations."""
        return self.shared | {"skip_bad": self.config.skip_bad}

    def load(self, stage, head="lm"):
        """The model that a stage has made."""
        return load_with_head(self.at(stage), head, device=self.config.device)

    @property
    def questions(self):
        """The questions that a trainer may look at: those about the development facts, never the held-out ones."""
        return None if self.config.own_data else self.at("data", "dev.jsonl")

    def inputs(self, name, file=None):
        """The files of one kind: the user's, or the atlas's of that kind, which may be another `file`."""
        return getattr(self.config, name) or (self.at("data", file or OWN_DATA[name]),)


def make_data(stage):
    """The atlas; or what has been found in the user's files."""
    if not stage.config.own_data:
        record = atlas.write(stage.folder, stage.config.seed, **stage.told)
        sides, files = record["sides"], record["files"]
        print(f"{sum(sides.values()):,} facts: " + ", ".join(f"{n:,} {side}" for side, n in sides.items()))
        return {name: file["rows"] for name, file in files.items()} | {"facts": sum(sides.values())}
    stage.folder.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name.replace('_', ' ')}: {rows:,} rows" for name, rows in stage.rows.items()))
    return stage.rows


def count_rows(config):
    """{option: rows} of the user's files, each read to its end by the reader of its stage. ValueError: what that one
    would say, or there is no row; so a mistake in the last line of the last file is told before the first stage."""
    readers = {"sft_data": read_conversations, "preference_data": read_preferences, "prompts": read_prompts}
    texts = read(find_sources(config.pretrain_data), bad=Bad(config.skip_bad))
    found = {"pretrain_data": sum(1 for _ in texts)}
    for name, reader in readers.items():
        found[name] = len(read_files(getattr(config, name), reader, Bad(config.skip_bad)))
    for name, rows in found.items():
        if not rows:
            raise ValueError(f"--{name.replace('_', '-')}: no row can be used: it is empty")
    return found


def make_tokenizer(stage):
    inputs = tuple(str(path) for path in stage.inputs("pretrain_data"))
    settings = Prepare(
        inputs=inputs,
        out=stage.folder,
        seed=stage.config.seed,
        skip_bad=stage.config.skip_bad,
        **stage.told,
    )
    report = prepare(settings)
    print("\n".join(table(report)))
    sources = report.manifest["sources"].values()
    return {
        "documents": sum(source["documents"] for source in sources),
        "kept": sum(source["kept"] for source in sources),
        "tokens": sum(part["tokens"] for split in report.manifest["tokens"].values() for part in split.values()),
    }


def make_pretrain(stage):
    config = pretrain.PretrainConfig(data=stage.at("tokenizer"), **stage.shared)
    model, _ = pretrain.train(config)
    return {"parameters": model.flat.size, **compared(stage.folder, "eval_bits_per_byte")}


def make_sft(stage):
    sft.train(
        sft.SFTConfig(
            model=stage.at("pretrain"),
            data=stage.inputs("sft_data"),
            replay=stage.at("tokenizer"),
            questions=stage.questions,
            **stage.chat,
        )
    )
    return compared(stage.folder, "eval_perplexity")


def make_reward(stage):
    data = stage.inputs("preference_data", "rankings.jsonl")
    reward.train(reward.RewardConfig(model=stage.at("sft"), data=data, **stage.chat))
    return compared(stage.folder, "eval_accuracy")


def make_ppo(stage):
    config = ppo.PPOConfig(
        model=stage.at("sft"),
        reward=stage.at("reward"),
        prompts=stage.inputs("prompts"),
        questions=stage.questions,
        **stage.chat,
    )
    found = brief_probability(stage, config.temperature) if stage.questions else {}
    ppo.train(config)
    return found | compared(stage.folder, "eval_scores") | {"kl": compared(stage.folder, "eval_kl")["after"]}


def brief_probability(stage, temperature):
    """How probable SFT made the brief right answer, over the development questions: PPO finds only what is sampled."""
    model, tokenizer = stage.load("sft"), load_tokenizer(stage.at("sft"))
    template = template_of(stage.at("sft"))
    asked = [q for q in read_questions(stage.questions) if not q.must_refuse]
    encoded = [encode_answer([{"role": "user", "content": q.text}], atlas.brief(q), template, tokenizer) for q in asked]
    p = np.exp(answer_logprobs(model, encoded, padding_of(tokenizer), temperature))
    mean, median = float(p.mean()), float(np.median(p))
    print(f"before PPO the brief right answer has a probability of {mean:.3f} in the mean, {median:.3f} in the median")
    return {"brief_probability": mean, "brief_probability_median": median}


def make_dpo(stage):
    dpo.train(
        dpo.DPOConfig(
            model=stage.at("sft"),
            data=stage.inputs("preference_data"),
            questions=stage.questions,
            **stage.chat,
        )
    )
    return compared(stage.folder, "eval_rewards/accuracies") | {
        "margin": compared(stage.folder, "eval_rewards/margins")["after"]
    }


def compared(folder, metric):
    """{"before", "after"} training, of something measured on held-out data; None where nothing was held out."""
    _, values = read_metrics(folder).get(metric, ((), (None,)))
    return {"before": values[0], "after": values[-1]}


# ------------------------------------------------------------------ the report


SHOWN = {"fact": 4, "harmless": 1, "arithmetic": 1, "reasoning": 1, "refuse": 2}  # how many are shown of each kind


def make_report(stage):
    """What every model answers to the held-out questions (of the user's data: to held-out prompts), in numbers and in
    words. `run` prints it and writes the page."""
    models = {name: stage.load(made) for name, made in MODELS.items()}
    if stage.config.own_data:
        return answers_to_prompts(stage, models)
    return answers_to_questions(stage, models)


def answers_to_questions(stage, models):
    """{"models": {name: metrics}, "known": ..., "samples": ...} on the atlas's held-out questions."""
    tokenizer, template = load_tokenizer(stage.at("sft")), template_of(stage.at("sft"))
    questions = read_questions(stage.at("data", "heldout.jsonl"))
    world = {(f.relation, f.subject): f for f in atlas.facts()}
    facts = {q: world[q.relation, q.subject] for q in questions if q.kind == "fact"}
    held = held_facts(models["base"], tokenizer, facts.values())
    known = {q for q, fact in facts.items() if fact in held}
    found, said = {}, {}
    for name, model in models.items():
        # The base model gets the question as the beginning of a document: of turns and templates it knows nothing.
        asked = question_prompts(questions, None if name == "base" else template, tokenizer)
        stop = stops(None if name == "base" else template, tokenizer)
        answers = answer(model, tokenizer, asked, stop)
        texts = [a.text for a in answers]
        found[name] = gold_metrics(questions, texts) | text_metrics(answers)
        some = [(q, text) for q, text in zip(questions, texts, strict=True) if q in known]
        found[name]["known_facts"] = gold_metrics(*zip(*some, strict=True))["facts"] if some else None
        found[name]["kl"] = None
        if name in ("ppo", "dpo"):
            sampled = answer(model, tokenizer, asked, stop, temperature=1.0, seed=stage.config.seed)
            rows = answered_rows(asked, sampled, padding_of(tokenizer))
            found[name]["kl"] = divergence(model, models["sft"], rows)
        said[name] = texts
    shown = [i for kind, n in SHOWN.items() for i in spread([i for i, q in enumerate(questions) if q.kind == kind], n)]
    samples = [(questions[i].text, [said[name][i] for name in models], questions[i].answer) for i in shown]
    return {
        "questions": len(questions),
        "known": len(known),
        "asked": len(facts),
        **ranked_right(stage),
        "models": found,
        "samples": samples,
    }


def ranked_right(stage):
    """{"clean_pairs", "heldout_pairs"}: the reward model's accuracy on all pairs of rankings without a mistake in their
    order: of answers drawn anew, mostly to prompts that it was trained on, and of answers about held-out facts."""
    folder, found = stage.at("reward"), {}
    model, tokenizer, template = stage.load("reward", "scalar"), load_tokenizer(folder), template_of(folder)
    for name, file in (("clean_pairs", "clean_rankings.jsonl"), ("heldout_pairs", "heldout_rankings.jsonl")):
        rankings = read_files((stage.at("data", file),), read_preferences)
        examples = encode_preferences(rankings, template, tokenizer, model.config.max_position_embeddings - 1)
        found[name] = reward.measure(model, examples, padding_of(tokenizer))["eval_accuracy"]
    return found


def answers_to_prompts(stage, models):
    """{"models": {name: metrics}, "samples": ...} on the prompts that PPO held out."""
    tokenizer, template = load_tokenizer(stage.at("sft")), template_of(stage.at("sft"))
    config = Stage(stage.config, "ppo").chat
    prompts = read_files(stage.inputs("prompts"), read_prompts, Bad(stage.config.skip_bad))
    _, held = hold_out(prompts, ppo.PPOConfig.held_out, stage.config.seed, key=lambda p: str(question_of(p.messages)))
    new = config.get("max_new_tokens", ppo.PPOConfig.max_new_tokens)
    context = models["sft"].config.max_position_embeddings
    tests = spread(encode_prompts(held, template, tokenizer, context - new), 64)
    found, said = {}, {}
    for name, model in models.items():
        asked, stop = [ids for ids, _ in tests], stops(template, tokenizer)
        if name == "base":
            texts = [question_of(p.messages)[-1]["content"] for _, p in tests]
            asked = [document_ids(tokenizer, text)[-(context - new) :] for text in texts]
            stop = stops(None, tokenizer)
        answers = answer(model, tokenizer, asked, stop, new)
        found[name] = text_metrics(answers) | {"kl": None}
        if name in ("ppo", "dpo"):
            sampled = answer(model, tokenizer, asked, stop, new, temperature=1.0, seed=stage.config.seed)
            found[name]["kl"] = divergence(model, models["sft"], answered_rows(asked, sampled, padding_of(tokenizer)))
        said[name] = [a.text for a in answers]
    shown = spread(list(range(len(tests))), 8)
    texts = [question_of(p.messages)[-1]["content"] for _, p in tests]
    samples = [(texts[i], [said[name][i] for name in models], "") for i in shown]
    return {"questions": len(tests), "models": found, "samples": samples}


MAKE = {
    "data": make_data,
    "tokenizer": make_tokenizer,
    "pretrain": make_pretrain,
    "sft": make_sft,
    "reward": make_reward,
    "ppo": make_ppo,
    "dpo": make_dpo,
    "report": make_report,
}


# ------------------------------------------------------------------ the run


def run(config):
    """Every stage that is not done; then the table and OUT/report.html. Returns the notes, {"stages": {name: ...}}.

    ValueError: OUT is somebody else's, or was made with other settings.
    """
    check_device(config.device)
    extra("matplotlib.figure", "plot")  # the report needs it: said now, and not after an hour
    for name in ("sft_data", "preference_data", "prompts"):
        for path in getattr(config, name):
            if not path.is_file():
                raise ValueError(f"{path}: no such file")
    notes = read_notes(config)  # what is wrong is told before anything is touched
    rows = count_rows(config) if config.own_data and "data" not in notes["stages"] else None
    with locked(config.out):
        return _stages(config, rows)


def _stages(config, rows):
    notes = read_notes(config)
    for name in config.repeated:
        shutil.rmtree(config.out / name, ignore_errors=True)
    write_json(config.out / NOTES, notes)
    for number, name in enumerate(STAGES, 1):
        if name in notes["stages"]:
            print(f"[{number}/{len(STAGES)}] {name}: done before, in {duration(notes['stages'][name]['seconds'])}")
            continue
        print(f"\n[{number}/{len(STAGES)}] {name}", flush=True)
        reset_peak_memory()
        stage = Stage(config, name, rows)
        # What a run left that was stopped; a trainer goes on with it, and with the time that it has taken.
        spent = notes.pop("spent", {}).get(name, 0.0) if stage.begun and config.resume else 0.0
        for left in (stage.folder, stage.folder.with_name(f"{name}.partial")):
            if not (stage.begun and config.resume):
                shutil.rmtree(left, ignore_errors=True)
        begin = time.perf_counter() - spent
        try:
            found = MAKE[name](stage)
        except BaseException:
            with contextlib.suppress(OSError):  # of a full disk, which is told
                write_json(config.out / NOTES, notes | {"spent": {name: time.perf_counter() - begin}})
            raise
        done = {"seconds": time.perf_counter() - begin, "peak_memory": peak_memory()}
        notes["stages"][name] = done | found
        write_json(config.out / NOTES, notes)
        print(f"[{number}/{len(STAGES)}] {name}: {duration(done['seconds'])}", flush=True)
    write_page(config, notes)
    print("\n" + "\n".join(summary(config, notes)))
    return notes


def read_notes(config):
    """What is done, from OUT/pipeline.json; less what --from repeats. Changes nothing. ValueError: see `run`."""
    path = config.out / NOTES
    settings = {name: value for name, value in vars(config).items() if name not in FREE}
    settings = json.loads(json.dumps(settings, default=str))
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(f"{config.out} is a file, and has to be a folder")
    notes = {"settings": settings, "stages": {}}
    if path.exists():
        try:
            notes = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        if not isinstance(notes, dict) or not all(isinstance(notes.get(key), dict) for key in ("settings", "stages")):
            raise ValueError(f"{path} is not the pipeline's: it needs settings and stages")
        changed = [name for name, value in settings.items() if notes["settings"].get(name) != value]
        if changed and config.from_ != "data":
            was = ", ".join(f"--{name.replace('_', '-')} {notes['settings'].get(name)}" for name in changed)
            raise ValueError(f"{config.out} was made with {was}: take another --out, or begin again with --from data")
        notes["settings"] = settings
    elif config.out.exists() and any(there.name != LOCK for there in config.out.iterdir()):
        raise ValueError(f"{config.out} is not empty, and was not made by the pipeline: take another --out")
    for name in config.repeated:
        notes["stages"].pop(name, None)
    return notes


def reset_peak_memory():
    """Forget the largest memory so far, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory():
    """The largest memory of this process in bytes, since reset_peak_memory (elsewhere than on Linux: since it began);
    None where the system does not tell."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------ what a person reads


def duration(seconds):
    """12 s, 3 min 20 s, 1 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def percent(share):
    return None if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def number(value, digits=2):
    return None if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


# What the held-out answers are judged by: (line of the table, metric, how it is written).
JUDGED = (
    ("gold reward", "gold", number),
    ("right", "right", percent),
    ("facts right", "facts", percent),
    ("facts right that base holds", "known_facts", percent),
    ("answered", "answered", percent),
    ("brief (1: no word too many)", "brief", number),
    ("polite", "polite", percent),
    ("refused what must be", "refused_rightly", percent),
    ("refused the rest", "refused_wrongly", percent),
    ("words", "words", number),
    ("tokens", "length", number),
    ("did not end", "missing_eos", percent),
    ("repetition", "repetition", percent),
    ("distinct word pairs", "distinct_2", percent),
    ("KL to sft", "kl", number),
)


def judged_table(found):
    """(columns, rows) of what every model answered."""
    models = found["models"]
    rows = []
    for line, metric, write in JUDGED:
        values = [metrics.get(metric) for metrics in models.values()]
        if any(value is not None for value in values):
            rows.append((line, *[None if value is None else write(value) for value in values]))
    return ("answers to held-out questions", *models), rows


# Of each stage: what was measured on its held-out data, and how it is written.
MEASURED = {
    "pretrain": ("bits per byte of held-out text", number),
    "sft": ("perplexity of held-out answers", number),
    "reward": ("held-out pairs ranked right", percent),
    "ppo": ("score by the reward model, in its sd", number),
    "dpo": ("held-out pairs ranked right", percent),
}


def stage_table(stages):
    """(columns, rows) of what every stage did and took."""
    rows = []
    for name in STAGES:
        found = stages[name]
        measure, write = MEASURED.get(name, ("", number))
        before, after = (None if found.get(k) is None else write(found[k]) for k in ("before", "after"))
        memory = None if found["peak_memory"] is None else f"{found['peak_memory'] / 2**20:,.0f} MB"
        rows.append((name, measure or counted(found), before, after, duration(found["seconds"]), memory))
    return ("stage", "measured", "before", "after", "time", "memory"), rows


def counted(found):
    """What a stage made that measures nothing, in words."""
    names = ("facts", "documents", "kept", "tokens", "questions", "sft_data", "preference_data", "prompts")
    return ", ".join(f"{found[name]:,} {name.replace('_', ' ')}" for name in names if name in found)


def summary(config, notes):
    """The last screen of a run, as lines."""
    stages = notes["stages"]
    yield from table_lines(*stage_table(stages))
    yield ""
    yield from table_lines(*judged_table(stages["report"]))
    yield ""
    report = stages["report"]
    if "clean_pairs" in report:
        asked, held = percent(report["clean_pairs"]), percent(report["heldout_pairs"])
        yield f"reward model: {asked} of clean pairs ranked right about facts it was asked, {held} about held-out facts"
    total = duration(sum(found["seconds"] for found in stages.values()))
    yield f"{stages['pretrain']['parameters']:,} parameters, seed {config.seed}, {total}: {config.out / 'report.html'}"
    yield f"python scripts/chat.py {shlex.quote(str(config.out / 'ppo'))}"


# The curves of the page: (title, metric, stages, prefixes). A curve that a run does not have is left out.
CURVES = (
    ("loss of pretraining and SFT", "loss", ("pretrain", "sft"), ("", "eval_")),
    ("bits per byte of held-out text", "bits_per_byte", ("pretrain",), ("eval_",)),
    ("development questions right", "right", ("sft", "ppo", "dpo"), ("eval_",)),
    ("reward model: held-out pairs ranked right", "accuracy", ("reward",), ("", "eval_")),
    ("PPO: score by the reward model, in its sd", "scores", ("ppo",), ("eval_", "objective/")),
    ("gold reward of development questions", "gold", ("sft", "ppo", "dpo"), ("eval_",)),
    ("PPO: KL to the SFT model, nats per answer", "kl", ("ppo",), ("objective/", "eval_")),
    ("PPO: the reward model's accuracy on its answers", "reward_accuracy", ("ppo",), ("eval_",)),
    ("PPO: tokens of an answer", "length", ("ppo",), ("", "eval_")),
    ("DPO: margins", "rewards/margins", ("dpo",), ("", "eval_")),
    ("DPO: pairs ranked right", "rewards/accuracies", ("dpo",), ("", "eval_")),
    ("DPO: log-probability of the chosen answer", "logps/chosen", ("dpo",), ("", "eval_")),
)


def panels(config):
    """The Panels of all CURVES that the runs have."""
    curves = {name: read_metrics(config.out / name) for name in ("pretrain", "sft", "reward", "ppo", "dpo")}
    found = []
    for title, metric, stages, prefixes in CURVES:
        runs = {name: curves[name] for name in stages if any(p + metric in curves[name] for p in prefixes)}
        if runs:
            found.append(metric_panel(title, runs, metric, prefixes))
    return found


def write_page(config, notes):
    """OUT/report.html."""
    stages, found = notes["stages"], notes["stages"]["report"]
    own = config.own_data
    blocks = [
        Facts(
            {
                "parameters": stages["pretrain"]["parameters"],
                "seed": config.seed,
                "size": config.size,
                "time": duration(sum(stage["seconds"] for stage in stages.values())),
                "minillm": __version__,
            }
        ),
        Heading("What each stage changed"),
        Table(*judged_table(found), align="lrrrr", notes=OWN_NOTES if own else ATLAS_NOTES.format(**found)),
        Heading("The stages"),
        Table(*stage_table(stages), align="llrrrr"),
        Heading("The same questions"),
        Samples(list(MODELS), found["samples"], "The likeliest answer of each model."),
        Heading("Curves"),
        Figure(draw(panels(config)), "Lines with dots are measured on held-out data."),
        Heading("Settings"),
        *(Details(name, settings_of(config, name)) for name in STAGES if settings_of(config, name)),
    ]
    page(config.out / "report.html", "From raw text to an aligned model", blocks)


def settings_of(config, name):
    """What a stage was told, {name: value}."""
    path = config.out / name / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else config.recipe.get(name, {})


ATLAS_NOTES = """{questions:,} questions that no stage has seen, about facts that documents state and no conversation
asks. The base model holds {known:,} of the {asked:,} facts asked for: it completes most of such a fact's
statements. base gets a question as the beginning of a document, the others as a user's turn. Gold reward: 1 for a right
answer, up to 0.3 more if it is brief, 0.4 less if it is rude. KL in nats per sampled answer."""
OWN_NOTES = "Answers to prompts that PPO held out; KL in nats per sampled answer. base continues them as text."
