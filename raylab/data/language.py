"""The made-up language of the synthetic notes: its words, templates and lists, and the hidden rules of one seed."""

import itertools
from dataclasses import dataclass

import numpy as np

TASKS = {
    "condition": ["cardiac", "renal", "respiratory", "neurologic", "endocrine", "infectious"],
    "severity": ["mild", "moderate", "severe"],
    "outcome": ["recovered", "readmitted"],
}
CATEGORIES = ["discharge_summary", "nursing", "radiology", "physician", "consult"]
SERVICES = ["medicine", "surgery", "specialty", "intensive", "transitional"]
NUM_PROBLEMS = 18  # three belong to each condition
OWN_PROBLEMS = 0.9  # share of a condition's mix that lies on its own problems
LIST_SIZE = 128  # words a list

# Slots of a template. The first group draws from a list under the Zipf law, the second repeats what the note has fixed.
# The figure is the chance of drawing from the list of the problem or class, not from the one that all share.
LIST_SLOTS = {
    "topic": 0.8,
    "phrase_a": 0.9,
    "phrase_b": 0.9,  # same draw as the phrase_a before it: a fixed phrase
    "modifier": 0.75,
    "course": 0.85,
    "style": 0.7,
    "header": 1.0,
    "general": 1.0,
    "join": 1.0,
}
FIXED_SLOTS = ["drug", "dose", "date", "person", "recurring", "vital"]
SLOTS = [*LIST_SLOTS, *FIXED_SLOTS]
STRENGTH = np.array([*LIST_SLOTS.values(), *[1.0] * len(FIXED_SLOTS)])

TEMPLATES = """
the patient reports {topic} {join} {topic} since {date}
there is {modifier} {topic} of the {phrase_a} {phrase_b}
started on {drug} {dose} mg daily for {topic}
{drug} {dose} mg was continued and the {topic} was {course}
seen by Dr {person} who noted {modifier} {phrase_a} {phrase_b} {join} {topic}
{phrase_a} {phrase_b} remains {modifier} {join} {recurring}
no evidence of {topic} {join} {topic} on this {style}
{general} {style} was {course} after {drug} on {date}
the {recurring} is {modifier} with a reading of {vital} and {topic}
discussed with Dr {person} about {recurring} and the {general}
{modifier} {topic} {join} {modifier} {topic} was found in the {style}
plan is to {general} the {phrase_a} {phrase_b} and review {recurring}
on examination {topic} was {modifier} at {vital} per minute
he was {course} and the {general} was {course}
she remains {course} {join} {general} since the {topic}
in summary a {modifier} {phrase_a} {phrase_b} that is {course}
{recurring} and {topic} were compared to {date} and are {course}
for the {style} we will {general} and {general} with {topic}
the {style} of {date} showed {topic} {join} {recurring}
given {topic} and {vital} units of {drug} the {style} was repeated
it was {general} that {phrase_a} {phrase_b} {join} {recurring} may be {modifier}
we thank Dr {person} for the {style} of this {general} patient
overall {course} with {general} {join} {topic} under {drug}
""".strip().splitlines()

HEADERS = [
    "Admission: Course: Disposition: Medications: Followup: Diagnosis:",
    "Shift: Intake: Comfort: Skin: Safety: Plan:",
    "Technique: Comparison: Findings: Impression: Indication: Views:",
    "Subjective: Objective: Assessment: Plan: Exam: Overnight:",
    "Question: Opinion: Recommendations: Background: Exam: Referral:",
]
JOINS = "and with of in for to without or from by after before during despite under near over at"
MODIFIERS = (
    "trivial minimal slight faint occasional gentle soft small intermittent light tolerable modest partial limited "
    "persistent noticeable variable mixed regular definite evident recurrent distinct diffuse marked intense extensive "
    "gross critical profound extreme worrying unremitting florid massive overwhelming"
)
COURSES = (
    "better resolved settled comfortable eating walking independent stronger steady resting improving clearing stable "
    "unchanged monitored slow tired uncertain fluctuating delayed weaker confused relapsing failing worse declining"
)
STEMS = (
    "cardi nephr pulm neur gastr hepat derm oste arthr my angi hem lymph thyr adren pancre cyst enter col bronch "
    "trache laryng ot rhin ophth kerat encephal mening phleb arter ven thromb cost spondyl tend fasci lip gluc kal "
    "natr calc ferr vol mur tor bel sor gan pil ral dux fen"
)
NOUN_ENDS = (
    "itis osis emia algia opathy oma ectasia uria edema plegia trophy rrhage spasm stasis lysis genesis megaly ptosis "
    "sclerosis graphy metry scopy tomy plasty rrhea pnea phasia penia cele lith oid ase ine ulation ence ement"
)
ADJECTIVE_ENDS = "al ic ous ar oid ile ent ive"
GENERAL_ENDS = "er ate ify ing ward et ment ure ish esque"
DRUG_STARTS = "zel vor qui mal tev ryx nol bax dru fep lom ixa sud cav jor"
DRUG_MIDDLES = "ata ori ume ilo ena axi ope uva"
DRUG_ENDS = "zolin draxa mibrel vantin sorpa culex tirol pexan"
NAME_STARTS = "Vorl Zeqn Krav Thul Brax Yord Quil Snev Drox Plim Gwez Jask Fleb Morq Trez"
NAME_MIDDLES = "ax ep ul ov iq ez ob ur"
NAME_ENDS = "wick dorn quist mazh feld nox tarl pov"
MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec"


@dataclass(frozen=True)
class Language:
    """All that one seed fixes for every patient: the words, the lists and the hidden rules.

    words[4, V]: each word with its trailing space; row 1 ends a sentence, row 2 starts one, row 3 does both.
    table[rows, LIST_SIZE]: word ids, most frequent first; law[LIST_SIZE]: cumulative Zipf law over the ranks.
    first_row: first row of each kind of list; neutral[slots]: the row that replaces a slot's own row.
    slots, starts, lengths: the templates laid end to end; a slot is a word id, or -(slot number + 1). The second half
    of the templates is the first half with a header before.
    template_order[categories, T]: templates by frequency; template_law[T].
    mix[conditions, problems]: chances, rows sum to 1; threshold[conditions]: lowest severity with a bad outcome.
    """

    words: np.ndarray
    table: np.ndarray
    law: np.ndarray
    first_row: dict[str, int]
    neutral: np.ndarray
    slots: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    template_order: np.ndarray
    template_law: np.ndarray
    mix: np.ndarray
    threshold: np.ndarray
    service_of: np.ndarray
    drugs: np.ndarray
    people: np.ndarray
    dates: np.ndarray
    numbers: np.ndarray


def _combine(*parts: str) -> list[str]:
    """Every word made of one piece of each part; a part is its pieces between blanks."""
    return ["".join(pieces) for pieces in itertools.product(*(part.split() for part in parts))]


def _zipf_law(size: int, *, exponent: float) -> np.ndarray:
    """Cumulative chances [size] of ranks under a Zipf law."""
    weights = 1.0 / np.arange(1, size + 1) ** exponent
    return np.cumsum(weights) / weights.sum()


def draw(cumulative: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Index of each uniform draw in a cumulative law; the rounded last step may lie just below 1."""
    return np.minimum(np.searchsorted(cumulative, uniform, side="right"), len(cumulative) - 1)


def _order_along_scale(words: list[str], num_classes: int, rng: np.random.Generator) -> list[list[str]]:
    """For each class the same words, those near the class's place on the scale first, with much disorder."""
    place = np.linspace(0, 1, len(words))
    centres = np.linspace(0, 1, num_classes)
    return [[words[i] for i in np.argsort(np.abs(place - c) + rng.normal(0, 0.2, len(words)))] for c in centres]


def build_language(seed: int) -> Language:
    """Everything that all patients of a seed share."""
    rng = np.random.default_rng([seed, 0])
    ids: dict[str, int] = {}

    def number(words: list[str]) -> np.ndarray:
        return np.array([ids.setdefault(word, len(ids)) for word in words])

    def shuffled(starts: str, ends: str) -> list[str]:
        words = _combine(starts, ends)
        return [words[i] for i in rng.permutation(len(words))]

    nouns = shuffled(STEMS, NOUN_ENDS)
    # The first words of phrases appear nowhere else, so that the second is predictable from the first.
    phrase_firsts, topic_words = nouns[:360], nouns[360:1560]
    adjectives = shuffled(STEMS, ADJECTIVE_ENDS)
    modifiers, courses, phrase_seconds = MODIFIERS.split(), COURSES.split(), adjectives[:180]
    generals = shuffled(STEMS, GENERAL_ENDS)

    def some(words: list[str], size: int = LIST_SIZE) -> list[str]:
        return [words[i] for i in rng.choice(len(words), size, replace=False)]

    first_row: dict[str, int] = {}
    lists: list[list[str]] = []

    def add(kind: str, new: list[list[str]]) -> None:
        first_row[kind] = len(lists)
        # A short list is repeated: its law stays steep, its tail is flatter.
        lists.extend([(words * LIST_SIZE)[:LIST_SIZE] for words in new])

    # Problems share words: each list takes 128 of 1,200, so a word serves about two problems.
    add("topic", [some(topic_words) for _ in range(NUM_PROBLEMS)])
    phrases = list(zip(phrase_firsts, [phrase_seconds[i] for i in rng.integers(180, size=360)], strict=True))
    chosen = [[phrases[i] for i in rng.choice(360, 16, replace=False)] for _ in range(NUM_PROBLEMS)]
    add("phrase_a", [[first for first, _ in pairs] for pairs in chosen])
    add("phrase_b", [[second for _, second in pairs] for pairs in chosen])
    add("modifier", _order_along_scale(modifiers, len(TASKS["severity"]), rng))
    add("course", _order_along_scale(courses, len(TASKS["outcome"]), rng))
    add("style", [some(generals[:300], 64) for _ in CATEGORIES])
    add("header", [headers.split() for headers in HEADERS])
    add("general", [generals[300 : 300 + LIST_SIZE]])
    add("join", [JOINS.split()])
    common = [phrases[i] for i in rng.choice(360, 60, replace=False)]
    add("topic_neutral", [some(topic_words)])
    add("phrase_a_neutral", [[first for first, _ in common]])
    add("phrase_b_neutral", [[second for _, second in common]])
    add("modifier_neutral", [some(modifiers, len(modifiers))])
    add("course_neutral", [some(courses, len(courses))])
    add("style_neutral", [some(generals[:300])])
    table = np.stack([number(words) for words in lists])

    codes = {f"{{{slot}}}": -(i + 1) for i, slot in enumerate(SLOTS)}
    plain = [[codes[w] if w in codes else int(number([w])[0]) for w in template.split()] for template in TEMPLATES]
    templates = plain + [[codes["{header}"], *template] for template in plain]
    lengths = np.array([len(template) for template in templates])
    drugs = number(_combine(DRUG_STARTS, DRUG_MIDDLES, DRUG_ENDS))
    people = number(_combine(NAME_STARTS, NAME_MIDDLES, NAME_ENDS))
    dates = number([f"{day}-{month}" for month in MONTHS.split() for day in range(1, 29)])
    numbers = number([str(i) for i in range(301)])
    words = list(ids)
    starting = [word[0].upper() + word[1:] for word in words]

    num_conditions = len(TASKS["condition"])
    mix = np.full((num_conditions, NUM_PROBLEMS), (1 - OWN_PROBLEMS) / NUM_PROBLEMS)
    own = rng.permutation(NUM_PROBLEMS).reshape(num_conditions, -1)
    np.put_along_axis(mix, own, np.take_along_axis(mix, own, 1) + OWN_PROBLEMS / own.shape[1], 1)
    return Language(
        words=np.array(
            [
                [f"{word} " for word in words],
                [f"{word}. " for word in words],
                [f"{word} " for word in starting],
                [f"{word}. " for word in starting],
            ],
            dtype=object,
        ),
        table=table,
        law=_zipf_law(LIST_SIZE, exponent=0.9),
        first_row=first_row,
        neutral=np.array([first_row.get(f"{slot}_neutral", first_row.get(slot, 0)) for slot in SLOTS]),
        slots=np.array([code for template in templates for code in template]),
        starts=np.concatenate([[0], np.cumsum(lengths)[:-1]]),
        lengths=lengths,
        template_order=np.stack([rng.permutation(len(plain)) for _ in CATEGORIES]),
        template_law=_zipf_law(len(plain), exponent=0.5),
        mix=mix,
        # Half of the conditions turn bad from the middle severity on, half only at the highest.
        threshold=rng.permutation(np.arange(num_conditions) % 2 + 1),
        service_of=rng.permutation(num_conditions) % len(SERVICES),
        drugs=drugs,
        people=people,
        dates=dates,
        numbers=numbers,
    )
