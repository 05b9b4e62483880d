"""
Write tasks for lm-evaluation-harness about the facts of an atlas: local files, so that nothing is fetched.

    python scripts/atlas_task.py --questions world/heldout.jsonl --out tasks
    python -m minillm.harness run --model minillm --model_args path=sft --include_path tasks --tasks atlas_cloze

    atlas_cloze      which of four names is the likeliest end of a statement, as documents make it
    atlas_question   which of four answers to a question is the likeliest; for a model that was taught to chat, with the
                     harness's --apply_chat_template
    atlas_answer     the end of the statement is written: exactly the name, or not
    atlas_text       perplexity of new pages about these facts

The same questions and seed give the same bytes, apart from the place of the data, which the tasks name in full.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.data import atlas
from minillm.trainers.evaluation import read_questions, spread

OPTIONS = 4
HEAD = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
"""
CHOICE = """output_type: multiple_choice
doc_to_text: {text}
doc_to_choice: {choices}
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
ANSWER = r"""output_type: generate_until
doc_to_text: statement
doc_to_target: name
generation_kwargs: {until: [".", "\n"], max_gen_toks: 24, do_sample: false}
filter_list:
  - name: stripped
    filter: [{function: remove_whitespace}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
TEXT = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
TASKS = {  # name: (the file of its rows, what there is to be done with them)
    "atlas_cloze": ("facts.jsonl", CHOICE.format(text="statement", choices="names")),
    "atlas_question": ("facts.jsonl", CHOICE.format(text="question", choices="answers")),
    "atlas_answer": ("facts.jsonl", ANSWER),
    "atlas_text": ("pages.jsonl", TEXT),
}


def parse(arguments):
    parser = command_line.Parser(description="Write tasks for lm-evaluation-harness about the facts of an atlas.")
    parser.add_argument("--questions", type=Path, required=True, metavar="PATH", help="heldout.jsonl of atlas.py")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--rows", type=int, default=100, metavar="N", help="facts at most, and pages (100)")
    parser.add_argument("--seed", type=int, default=0, help="which wrong answers, and which pages (0)")
    options = parser.parse_args(arguments)
    if options.rows < 1:
        parser.error(f"--rows must be at least 1, and is {options.rows}")
    return options


def rows_of(questions, most, seed):
    """(at most `most` rows, all facts): the rows spread over those Questions that ask for a fact, each fact once.

    A row has the statement, the question, the name and the place (label) of the right option among `names` and, as an
    answer to the question, `answers`. The wrong ones are right elsewhere in the file. Left out are facts of relations
    with too few names, those that no statement ends with, and names with a period, with which a statement would end.
    """
    facts, rng = {(fact.relation, fact.subject): fact for fact in atlas.facts()}, atlas.stream(seed, "tasks")
    asked = {facts[q.relation, q.subject]: q for q in reversed(questions) if (q.relation, q.subject) in facts}
    names = {}
    for fact in reversed(asked):
        names.setdefault(fact.relation, {})[fact.answer] = None
    rows = []
    for fact, question in reversed(asked.items()):
        right = {fact.answer, *question.aliases}
        wrong = [name for name in names[fact.relation] if name not in right]
        statements = [text for text in atlas.clozes(fact) if not text.endswith("\n")]  # the others are headings
        if question.kind != "fact" or len(wrong) < OPTIONS - 1 or not statements or "." in fact.answer:
            continue
        options = [fact.answer, *rng.sample(wrong, OPTIONS - 1)]
        rng.shuffle(options)
        rows.append(
            {
                "statement": rng.choice(statements),
                "question": question.text,
                "names": options,
                "answers": [f"{atlas.capital(name)}." for name in options],
                "name": fact.answer,
                "label": options.index(fact.answer),
            }
        )
    if not rows:
        raise ValueError(f"no fact has a statement and {OPTIONS} names to choose from: give more questions")
    return spread(rows, most), list(asked)


def run(options):
    rows, facts = rows_of(read_questions(options.questions), options.rows, options.seed)
    pages = atlas.corpus(f"tasks/{options.seed}", atlas.SMALLEST_SIZE, 0, tuple(reversed(facts)))
    pages = [{"text": page["text"]} for page in pages][: options.rows]
    options.out.mkdir(parents=True, exist_ok=True)
    for file, content in (("facts.jsonl", rows), ("pages.jsonl", pages)):
        atlas.write_lines(options.out / file, content)
    for name, (file, what) in TASKS.items():
        text = HEAD.format(name=name, file=json.dumps(str((options.out / file).resolve()))) + what
        (options.out / f"{name}.yaml").write_text(text, encoding="utf-8")
    print(f"{', '.join(TASKS)}: {len(rows)} facts and {len(pages)} pages, written to {options.out}")


if __name__ == "__main__":
    command_line.run(run, parse(None))
