"""A miniature of LongGenBench: one prompt holds K numbered questions, one long answer solves all of them in order.

    Question_7: Ann has 22 pens and buys 5 more.
    Question_8: Eve has as many cups as Answer_3 and loses 4.
    Solve Question_1 to Question_8.
    ...
    Answer_7: We start with 22. 22 + 5 = 27. So Answer_7 = 27. The answer is 27.
    Answer_8: We start with Answer_3 = 16. 16 - 4 = 12. So Answer_8 = 12. The answer is 12.

Question 8 is a cross-reference: it can only be solved by reading back a line that the model itself wrote.
"""

# ruff: noqa: SIM905 (word lists read best as one string)
import re
from dataclasses import dataclass
from random import Random

MAX_LABEL = 40  # labels run from _1 to _40
MAX_VALUE = 99  # every number in a text is one token, 0 to 99

NAMES = "Ann Ben Cara Dan Eve Finn Gina Hugo Iris Jack Kate Leo Mia Noah Olga Paul".split()
ITEMS = "pens cups books coins cards shells stamps apples pears keys maps balls hats rings nuts beads".split()
GAINS = "buys finds gets wins".split()
LOSSES = "loses sells drops eats".split()

RESULT = re.compile(r"Answer_(\d+):[^\n]*?answer is (\d+)")


@dataclass
class Question:
    """One question with its solution. `reference` is the label of the answer it starts from, None for a plain one."""

    label: int
    name: str
    item: str
    verb: str
    start: int
    step: int
    reference: int | None

    @property
    def gains(self) -> bool:
        return self.verb in GAINS

    @property
    def result(self) -> int:
        return self.start + self.step if self.gains else self.start - self.step

    def text(self) -> str:
        start = f"{self.start} {self.item}"
        if self.reference is not None:
            start = f"as many {self.item} as Answer_{self.reference}"
        more = " more" if self.gains else ""
        return f"Question_{self.label}: {self.name} has {start} and {self.verb} {self.step}{more}.\n"

    def solution(self) -> str:
        source = self.start if self.reference is None else f"Answer_{self.reference} = {self.start}"
        equation = f"{self.start} {'+' if self.gains else '-'} {self.step} = {self.result}"
        conclusion = f"So Answer_{self.label} = {self.result}. The answer is {self.result}."
        return f"Answer_{self.label}: We start with {source}. {equation}. {conclusion}\n"


@dataclass
class Problem:
    """A prompt, its gold answer, and what a scorer needs: one expected integer and one flag per question."""

    prompt: str
    answer: str
    expected: list[int]
    is_reference: list[bool]


def make_problem(seed, n_questions: int, reference_rate: float = 0.4, min_distance: int = 1) -> Problem:
    """One problem with labels 1..n_questions. `seed` is a random.Random, or what one is made from (int or str)."""
    rng = seed if isinstance(seed, Random) else Random(seed)
    questions = make_questions(rng, n_questions, reference_rate, min_distance)
    return Problem(
        prompt=prompt_text(questions, questions),
        answer="".join(q.solution() for q in questions),
        expected=[q.result for q in questions],
        is_reference=[q.reference is not None for q in questions],
    )


def make_questions(
    rng: Random, n_questions: int, reference_rate: float, min_distance: int = 1, first_label: int = 1
) -> list[Question]:
    """Questions in answer order. A reference goes `min_distance` or more answers back; no answer is used twice."""
    if not 1 <= first_label <= first_label + n_questions - 1 <= MAX_LABEL:
        raise ValueError(f"{n_questions} questions from label {first_label} on do not fit labels 1 to {MAX_LABEL}")
    questions, unused = [], []
    for i in range(n_questions):
        if i >= min_distance:
            unused.append(questions[i - min_distance])
        source = None
        if unused and rng.random() < reference_rate:
            source = unused.pop(rng.randrange(len(unused)))
        questions.append(make_question(rng, first_label + i, source))
    return questions


def make_question(rng: Random, label: int, source: Question | None) -> Question:
    start = rng.randint(9, 40) if source is None else source.result
    step = rng.randint(1, 9)
    gains = start < step or (start + step <= MAX_VALUE and rng.random() < 0.5)
    verb = rng.choice(GAINS if gains else LOSSES)
    reference = None if source is None else source.label
    return Question(label, rng.choice(NAMES), rng.choice(ITEMS), verb, start, step, reference)


def prompt_text(questions: list[Question], order: list[Question]) -> str:
    """All question lines in the given order, then the line after which the answer begins."""
    first, last = questions[0].label, questions[-1].label
    return "".join(q.text() for q in order) + f"Solve Question_{first} to Question_{last}.\n"


def read_results(answer: str) -> dict[int, int]:
    """{label: integer} for every line `Answer_<label>: ... answer is <integer>`; the first line of a label counts."""
    results = {}
    for label, value in RESULT.findall(answer):
        results.setdefault(int(label), int(value))
    return results


def vocabulary() -> list[str]:
    """Every string that is one token: words, labels and numbers, with the space that precedes them."""
    words = "has as many and more Question Answer to We start with So The answer is + - =".split()
    spaced = [" " + w for w in NAMES + ITEMS + GAINS + LOSSES + words + [str(n) for n in range(MAX_VALUE + 1)]]
    labels = [f"_{n}" for n in range(1, MAX_LABEL + 1)]
    return ["\n", "Question", "Answer", "Solve", ":", "."] + labels + spaced
