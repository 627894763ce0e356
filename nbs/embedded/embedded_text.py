"""Wording shared by the notebooks of the embedded default: facts, sentences, questions and comparisons.

Everything here is deterministic: each function takes the `random.Random` it may draw from.
"""

import csv
import random
from dataclasses import dataclass
from pathlib import Path

PARTS = (("train", 0.70), ("validation", 0.05), ("test", 0.25))
CONDITION_SLOTS = ("investigation", "treatment", "red_flag", "specialty")
DRUG_SLOTS = ("drug_class", "use", "side_effect", "caution", "monitoring")
INSTRUCTION = 'End with "Final decision: yes", "Final decision: no" or "Final decision: maybe".'

# Every slot has names ("np": the question calls the slot so) and sentences ("say": the passage states it so).
# The "_new" lists are held out: they are used by the new-wording test rows and by nothing else.
WORDING = {
    "investigation": {
        "np": ["the first test for {e}", "the usual first test in {e}", "the first investigation for {e}", "the test done first in {e}",
               "the usual first investigation in {e}", "the test to start with in {e}"],
        "np_new": ["the initial test for {e}", "the opening investigation in {e}", "the test that comes before others in {e}"],
        "say": ["The first test for {e} is {v}.", "In {e}, the usual first test is {v}.", "{V} {is} the first test for {e}.",
                "Doctors start with {v} when they suspect {e}.", "The work-up of {e} starts with {v}.", "When {e} is suspected, {v} {is} done first.",
                "The first investigation in {e} is {v}.", "For {e}, clinics ask for {v} first.", "The usual first investigation for {e} is {v}.",
                "A doctor who thinks of {e} asks for {v} first."],
        "say_new": ["The initial test in {e} is {v}.", "Testing for {e} opens with {v}.", "{V} {is} requested before other tests in {e}.",
                    "Suspected {e} is looked into with {v} at the outset."],
        "ask": ["Does the work-up of {e} start with {v}?", "Should doctors ask for {v} first in {e}?", "When {e} is suspected, {is} {v} done first?",
                "Do clinics start with {v} in {e}?"],
        "ask_new": ["Does testing for {e} open with {v}?", "{Is} {v} requested before other tests in {e}?", "Would a clinic looking into {e} begin by ordering {v}?"],
    },
    "treatment": {
        "np": ["the first treatment for {e}", "the usual first treatment of {e}", "the treatment given first in {e}", "the usual treatment for {e}",
               "the first choice of treatment in {e}", "the treatment to start with in {e}"],
        "np_new": ["the initial remedy for {e}", "the preferred therapy in {e}", "the therapy that patients with {e} receive at the outset"],
        "say": ["The first treatment for {e} is {v}.", "In {e}, treatment starts with {v}.", "{V} {is} the usual first treatment of {e}.",
                "{E} is usually treated with {v}.", "For {e}, the usual treatment is {v}.", "People with {e} are given {v} first.",
                "The first choice of treatment in {e} is {v}.", "Doctors treat {e} with {v}.", "Treatment of {e} starts with {v}.",
                "The treatment given first in {e} is {v}."],
        "say_new": ["The preferred therapy for {e} is {v}.", "Patients with {e} receive {v} at the outset.", "{V} {is} the initial remedy in {e}.",
                    "Therapy of {e} opens with {v}."],
        "ask": ["Does treatment of {e} start with {v}?", "Are people with {e} given {v} first?", "Is {e} usually treated with {v}?",
                "Do doctors treat {e} with {v}?"],
        "ask_new": ["Do patients with {e} receive {v} at the outset?", "Does therapy of {e} open with {v}?", "Would someone with {e} be offered {v} to begin with?"],
    },
    "red_flag": {
        "np": ["the red flag in {e}", "the warning sign in {e}", "the sign that needs urgent care in {e}", "the danger sign in {e}",
               "the red flag to watch for in {e}", "the urgent sign in {e}"],
        "np_new": ["the alarm sign in {e}", "the feature of {e} that should bring someone back at once", "the worrying change in {e}"],
        "say": ["The red flag in {e} is {v}.", "The warning sign in {e} is {v}.", "In {e}, {v} {means} urgent care.", "People with {e} should watch for {v}.",
                "The sign that needs urgent care in {e} is {v}.", "{V} {is} the danger sign in {e}.", "With {e}, {v} {calls} for help the same day.",
                "The red flag to watch for in {e} is {v}.", "The urgent sign in {e} is {v}.", "Anyone with {e} and {v} needs urgent care."],
        "say_new": ["The alarm sign in {e} is {v}.", "{V} should bring someone with {e} back at once.", "The worrying change in {e} is {v}.",
                    "Patients with {e} are told to return immediately for {v}."],
        "ask": ["Should people with {e} watch for {v}?", "In {e}, {does} {v} mean urgent care?", "Does anyone with {e} and {v} need urgent care?",
                "With {e}, {does} {v} call for help the same day?"],
        "ask_new": ["Should {v} bring someone with {e} back at once?", "Are patients with {e} told to return immediately for {v}?",
                    "Would {v} be the alarm raised in {e}?"],
    },
    "specialty": {
        "np": ["the specialty for {e}", "the specialty that looks after {e}", "the usual specialty in {e}", "the field that deals with {e}",
               "the specialty that treats {e}"],
        "np_new": ["the department responsible for {e}", "the branch of medicine that covers {e}", "the service that manages {e}"],
        "say": ["The specialty for {e} is {v}.", "{E} is looked after by {v}.", "People with {e} are seen by {v}.", "{V} is the specialty that looks after {e}.",
                "{E} belongs to {v}.", "The field that deals with {e} is {v}.", "The usual specialty in {e} is {v}.", "{V} looks after {e}."],
        "say_new": ["The department responsible for {e} is {v}.", "{E} is managed by {v}.", "{E} is covered by {v}.",
                    "Referrals for {e} are sent to {v}."],
        "ask": ["Is {e} looked after by {v}?", "Are people with {e} seen by {v}?", "Does {e} belong to {v}?", "Does {v} look after {e}?"],
        "ask_new": ["Is {e} managed by {v}?", "Are referrals for {e} sent to {v}?", "Is {e} covered by {v}?"],
    },
    "drug_class": {
        "np": ["the class of {e}", "the drug class of {e}", "the group of {e}", "the class that {e} belongs to", "the drug group of {e}"],
        "np_new": ["the family of {e}", "the category that {e} falls into", "the kind of medicine that {e} is"],
        "say": ["{E} is {a} {v}.", "The class of {e} is {v}.", "The drug class of {e} is {v}.", "{E} is classed as {a} {v}.",
                "{E} belongs to the class {v}.", "The group of {e} is {v}.", "Doctors know {e} as {a} {v}.", "By class, {e} is {a} {v}."],
        "say_new": ["The family of {e} is {v}.", "{E} falls into the category {v}.", "The kind of medicine that {e} is: {v}.",
                    "Pharmacists sort {e} under {v}."],
        "ask": ["Is {e} {a} {v}?", "Is {e} classed as {a} {v}?", "Does {e} belong to the class {v}?", "By class, is {e} {a} {v}?"],
        "ask_new": ["Does {e} fall into the category {v}?", "Do pharmacists sort {e} under {v}?", "Would {e} count as {a} {v}?"],
    },
    "use": {
        "np": ["the main use of {e}", "the usual use of {e}", "the main reason to give {e}", "the main reason for {e}", "the use of {e}"],
        "np_new": ["the chief purpose of {e}", "the leading indication for {e}", "the problem that {e} is prescribed against"],
        "say": ["The main use of {e} is {v}.", "{E} is mainly used for {v}.", "Doctors give {e} mainly for {v}.", "The usual use of {e} is {v}.",
                "People take {e} mainly for {v}.", "The main reason to give {e} is {v}.", "{E} is mostly given for {v}.", "The use of {e} is {v}."],
        "say_new": ["The chief purpose of {e} is {v}.", "The leading indication for {e} is {v}.", "{E} is prescribed above all against {v}.",
                    "{V} {is} what {e} is prescribed against."],
        "ask": ["Is {e} mainly used for {v}?", "Do doctors give {e} mainly for {v}?", "Do people take {e} mainly for {v}?", "Is {e} mostly given for {v}?"],
        "ask_new": ["Is {e} prescribed above all against {v}?", "{Is} {v} what {e} is prescribed against?", "Would {v} be the chief purpose behind {e}?"],
    },
    "side_effect": {
        "np": ["the side effect of {e}", "the side effect named for {e}", "the side effect to expect with {e}", "the well-known side effect of {e}",
               "the side effect listed for {e}", "the usual side effect of {e}"],
        "np_new": ["the unwanted effect reported with {e}", "the adverse effect tied to {e}", "the complaint that {e} tends to bring"],
        "say": ["The side effect to expect with {e} is {v}.", "A well-known side effect of {e} is {v}.", "The side effect named for {e} is {v}.",
                "{E} can cause {v}.", "People who take {e} may notice {v}.", "The side effect listed for {e} is {v}.", "With {e}, {v} may follow.",
                "The usual side effect of {e} is {v}."],
        "say_new": ["The unwanted effect reported with {e} is {v}.", "{E} tends to bring {v}.", "{V} {is} the adverse effect tied to {e}.",
                    "Patients on {e} complain of {v}."],
        "ask": ["Does the passage say that {e} can cause {v}?", "Does the passage warn of {v} with {e}?", "According to the passage, may people who take {e} notice {v}?",
                "Does the passage say that {v} may follow with {e}?"],
        "ask_new": ["Does the extract report that {e} tends to bring {v}?", "Do these notes tie {e} to {v}?", "Does the summary have patients on {e} complain of {v}?"],
    },
    "caution": {
        "np": ["the main caution with {e}", "the caution for {e}", "the caution listed for {e}", "the main reason for care with {e}", "the main warning for {e}"],
        "np_new": ["the chief contraindication to {e}", "the situation in which {e} is best avoided", "the setting that argues against {e}"],
        "say": ["The main caution with {e} is {v}.", "The caution listed for {e} is {v}.", "The main reason for care with {e} is {v}.",
                "Before {e} is started, doctors ask about {v}.", "The main warning for {e} is {v}.", "{E} carries a caution about {v}.",
                "Care is needed when {e} meets {v}.", "The caution for {e} is {v}."],
        "say_new": ["The chief contraindication to {e} is {v}.", "{V} {is} the setting that argues against {e}.", "{E} is best avoided in {v}.",
                    "Prescribers hesitate over {e} because of {v}."],
        "ask": ["Does {e} carry a caution about {v}?", "Do doctors ask about {v} before {e} is started?", "Does the passage say that care is needed when {e} meets {v}?",
                "Does the passage warn about {v} with {e}?"],
        "ask_new": ["Is {e} best avoided in {v}, going by the extract?", "Do prescribers hesitate over {e} because of {v}?",
                    "Would {v} be the situation that argues against {e}?"],
    },
    "monitoring": {
        "np": ["the check made during {e} treatment", "the check needed with {e}", "the usual check with {e}", "the thing to monitor with {e}",
               "the check for people on {e}"],
        "np_new": ["the measurement to follow while on {e}", "the item reviewed at visits for {e}", "the follow-up that {e} requires"],
        "say": ["The check made during {e} treatment is {v}.", "The usual check with {e} is {v}.", "During {e} treatment, doctors check {v}.",
                "People on {e} have a check of {v}.", "The thing to monitor with {e} is {v}.", "The check needed with {e} is {v}.",
                "With {e}, doctors monitor {v}.", "The check for people on {e} is {v}."],
        "say_new": ["The measurement to follow while on {e} is {v}.", "The follow-up that {e} requires is {v}.", "Visits for {e} include a review of {v}.",
                    "Clinics keep an eye on {v} while {e} is taken."],
        "ask": ["During {e} treatment, do doctors check {v}?", "Do people on {e} have a check of {v}?", "Do doctors monitor {v} with {e}?",
                "Is {e} treatment followed by a check of {v}?"],
        "ask_new": ["Do visits for {e} include a review of {v}?", "Do clinics keep an eye on {v} while {e} is taken?", "Would {v} be followed while someone is on {e}?"],
    },
}

# Question frames for every slot: {n} is one of the slot's names.
FRAMES = ["{Is} {v} {n}?", "Is {n} {v}?", "Does the passage name {v} as {n}?", "According to the passage, is {n} {v}?", "Does the text give {v} as {n}?",
          "Going by the passage, {is} {v} {n}?", "Can {v} be taken as {n}?", "Does the passage say that {n} is {v}?", "Would {v} be {n}?",
          "Is it right that {n} is {v}?", "From this text, {is} {v} {n}?", "Do the authors name {v} as {n}?", "Is {n}, as described here, {v}?"]
FRAMES_NEW = ["Is it fair to call {v} {n}?", "Do these notes describe {v} as {n}?", "Judging from the extract, would {n} be {v}?",
              "Does this summary point to {v} as {n}?", "{Was} {v} put forward as {n}?", "Is {n} reported to be {v}?", "Do we learn that {n} is {v}?"]
CONTRAST = ["{N} is {v} rather than {w}.", "{N} is {v}, not {w}.", "{V}, not {w}, {is} {n}."]
CONTRAST_NEW = ["{N} is {v} instead of {w}.", "It is {v}, as opposed to {w}, that we call {n}."]
SILENT = ["{N} is not stated.", "Nothing is said about {n}.", "The authors leave {n} open.", "{N} is not given here.", "{N} was not recorded."]
SILENT_NEW = ["The extract is silent about {n}.", "No mention is made of {n}.", "{N} goes unmentioned."]
ABOUT = {"condition": ["{E}: {d}.", "This note is about {e}, {d}.", "The subject is {e}, {d}.", "We look at {e}, which means {d}.", "Here {e} means {d}."],
         "drug": ["This note is about the drug {e}.", "The subject is {e}, a medicine in common use.", "We look at treatment with {e}.", "Here we review {e}."]}
ABOUT_NEW = {"condition": ["The extract deals with {e}, {d}.", "Our topic is {e}, in other words {d}.", "{E} is a name for {d}."],
             "drug": ["The extract deals with the medicine {e}.", "Our topic is the tablet or injection called {e}."]}
FINDINGS = ["Typical findings are {f} and {g}.", "People with {e} often have {f} and {g}.", "Common signs are {f} and {g}.", "{E} often brings {f}.", "A typical finding is {f}."]
FINDINGS_NEW = ["Patients may describe {f} as well as {g}.", "The picture includes {f}.", "{F} and {g} are part of the picture."]
LABELS = ["BACKGROUND", "FINDINGS", "RESULTS", "MANAGEMENT", "ADVICE", "METHODS", "CONCLUSIONS"]
LABELS_NEW = ["OBJECTIVE", "SUMMARY", "OBSERVATIONS", "PRACTICE"]

# How a reader writes down what was read: {n} slot name, {v} value in the passage, {w} value asked about.
COMPARE = {
    "yes": ["On {n}, the {p} says {v}. The {q} says {w}, so the two agree.", "{N} is {v} in the {p} and {w} in the {q}, so the two agree.",
            "The {q} says that {n} is {w}. The {p} says {v}, so the two agree."],
    "no": ["On {n}, the {p} says {v}. The {q} says {w}, so the two differ.", "{N} is {v} in the {p} and {w} in the {q}, so the two differ.",
           "The {q} says that {n} is {w}. The {p} says {v}, so the two differ."],
    "maybe": ["On {n}, the {p} says nothing. The {q} says {w}, so this stays open.", "{N} is not stated in the {p} and {w} in the {q}, so this stays open.",
              "The {q} says that {n} is {w}. The {p} says nothing, so this stays open."],
}


@dataclass(frozen=True)
class Entity:
    """A condition or a drug with its facts."""

    name: str
    kind: str  # "condition" or "drug"
    part: str  # "train", "validation" or "test"
    slots: dict  # slot -> value
    description: str = ""
    findings: tuple = ()


def read_table(path):
    """Rows of a CSV file, with every cell stripped."""
    with open(path, encoding="utf-8", newline="") as handle:
        return [{key: value.strip() for key, value in row.items()} for row in csv.DictReader(handle)]


def load_facts(folder=".", seed=42):
    """All conditions and drugs, partitioned by name."""
    entities = []
    for kind, slots in (("condition", CONDITION_SLOTS), ("drug", DRUG_SLOTS)):
        rows = sorted(read_table(Path(folder) / f"{kind}s.csv"), key=lambda row: row[kind])
        random.Random(f"{seed}-{kind}").shuffle(rows)
        for position, row in enumerate(rows):
            findings = tuple(row[f"finding_{number}"] for number in (1, 2, 3)) if kind == "condition" else ()
            entities.append(Entity(row[kind], kind, part_of(position / len(rows)), {slot: row[slot] for slot in slots}, row.get("description", ""), findings))
    return entities


def part_of(fraction):
    """The partition that a position in the shuffled list (0 to 1) falls into."""
    edge = 0.0
    for part, share in PARTS:
        edge += share
        if fraction < edge:
            return part
    return PARTS[-1][0]


SINGULAR_S = {"measles", "mumps", "rickets", "diabetes", "herpes", "scabies", "rabies", "shingles", "ascites", "pus", "caries"}


def plural(phrase):
    """Whether a noun phrase takes a plural verb ("blood cultures" does, "urinalysis" and "loss of vision" do not)."""
    head = phrase
    for preposition in (" of ", " in ", " with ", " by ", " for ", " to ", " on ", " after ", " from ", " without ", " under ", " at ", " when ", " due ", " over ", " around "):
        head = head.split(preposition)[0]
    if " and " in head:
        return True
    word = head.split()[-1].lower()
    return word.endswith("s") and not word.endswith(("ss", "is", "us")) and word not in SINGULAR_S


def article(phrase):
    """"a" or "an", by sound."""
    first = phrase.split()[0]
    if first.isupper() or any(letter.isdigit() for letter in first):
        return "an" if first[0] in "AEFHILMNORSX8" else "a"
    return "an" if first[0].lower() in "aeiou" and not first.lower().startswith(("uni", "uri", "use", "eu")) else "a"


def cap(text):
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def fill(template, **words):
    """Fill a template; {V} is {v} with a capital, and {is}, {does}, {a} ... agree with the value {v}."""
    value = words.get("v", "")
    many = bool(value) and plural(value)
    verbs = {"is": "are" if many else "is", "Is": "Are" if many else "Is", "Was": "Were" if many else "Was", "does": "do" if many else "does",
             "means": "mean" if many else "means", "calls": "call" if many else "calls", "a": article(value) if value else "a"}
    capitals = {key.upper(): cap(text) for key, text in words.items()}
    return cap(template.format(**verbs, **words, **capitals))


def name_slot(rng, entity, slot, new=False):
    """A noun phrase for a slot of an entity ("the first test for gout")."""
    return rng.choice(WORDING[slot]["np_new" if new else "np"]).format(e=entity.name)


def state(rng, entity, slot, new=False, against=None):
    """A sentence that states a slot, here and there with the value that it is not (`against`)."""
    value = entity.slots[slot]
    if against and rng.random() < 0.25:
        return fill(rng.choice(CONTRAST_NEW if new else CONTRAST), n=name_slot(rng, entity, slot, new), v=value, w=against)
    return fill(rng.choice(WORDING[slot]["say_new" if new else "say"]), e=entity.name, v=value)


def leave_open(rng, entity, slot, new=False):
    """A sentence that says the slot is not stated."""
    return fill(rng.choice(SILENT_NEW if new else SILENT), n=name_slot(rng, entity, slot, new))


def introduce(rng, entity, new=False):
    """An opening sentence about an entity."""
    return fill(rng.choice((ABOUT_NEW if new else ABOUT)[entity.kind]), e=entity.name, d=entity.description)


def describe_findings(rng, entity, new=False):
    """A sentence with typical findings of a condition."""
    first, second = rng.sample(entity.findings, 2)
    return fill(rng.choice(FINDINGS_NEW if new else FINDINGS), e=entity.name, f=first, g=second)


def ask(rng, entity, slot, value, new=False):
    """A yes/no question about one slot of an entity."""
    words = WORDING[slot]
    if rng.random() < 0.35:
        return fill(rng.choice(words["ask_new" if new else "ask"]), e=entity.name, v=value)
    frame = rng.choice(FRAMES_NEW if new else FRAMES)
    return fill(frame, n=name_slot(rng, entity, slot, new), v=value)


def compare(rng, entity, slot, decision, value, passage="passage", claim="question"):
    """The reading step: what the passage says on the slot, what the question says, and how the two stand."""
    name = WORDING[slot]["np"][0].format(e=entity.name)
    return fill(rng.choice(COMPARE[decision]), n=name, v=entity.slots[slot], w=value, p=passage, q=claim)


@dataclass(frozen=True)
class Reading:
    """A passage and one thing to look up in it."""

    sections: tuple  # ((label, text), ...)
    entity: Entity
    slot: str
    decision: str
    value: str  # the value asked about


def other_value(rng, entity, slot, pool):
    """A value of the same slot that is wrong for this entity: from another specialty or class, and not one that overlaps it."""
    home = "specialty" if entity.kind == "condition" else "drug_class"
    mine = entity.slots[slot].lower()
    for _ in range(200):
        other = rng.choice(pool)
        theirs = other.slots[slot].lower()
        if other.kind == entity.kind and other.slots[home] != entity.slots[home] and mine not in theirs and theirs not in mine:
            return other.slots[slot]
    raise ValueError(f"`pool` has no other value for {slot} of {entity.name}; add entities")


def partner_for(rng, entity, pool):
    """A second entity for the passage: same kind, another specialty or class."""
    home = "specialty" if entity.kind == "condition" else "drug_class"
    others = [other for other in pool if other.kind == entity.kind and other.slots[home] != entity.slots[home]]
    return rng.choice(others)


def differ(left, right):
    """Whether two values are different and neither contains the other."""
    left, right = left.lower(), right.lower()
    return left not in right and right not in left


def make_reading(rng, entity, slot, decision, pool, new=False):
    """A passage about one or two entities, so that reading it gives the wanted decision."""
    partner = partner_for(rng, entity, pool) if rng.random() < 0.6 else None
    others = [name for name in entity.slots if name != slot]
    own = rng.sample(others, 1 if partner else 2) if decision != "maybe" else rng.sample(others, 2 if partner else 3)
    partner_states = bool(partner) and rng.random() < 0.75 and differ(partner.slots[slot], entity.slots[slot])
    value = asked_value(rng, entity, slot, decision, partner if partner_states else None, pool)
    against = None
    if decision != "maybe":
        against = value if decision == "no" else other_value(rng, entity, slot, pool)
    sentences = [state(rng, entity, name, new) for name in own]
    if decision != "maybe":
        sentences.append(state(rng, entity, slot, new, against))
    if decision == "maybe" and rng.random() < 0.35:
        sentences[0] = leave_open(rng, entity, slot, new)
    elif decision != "maybe" and rng.random() < 0.20:
        sentences[0] = leave_open(rng, entity, own[0], new)
    rng.shuffle(sentences)
    about = [slot] if partner_states else []
    about += rng.sample([name for name in others], 1) if partner and (not about or rng.random() < 0.5) else []
    extra = [state(rng, partner, name, new) for name in about] if partner else []
    rng.shuffle(extra)
    return Reading(lay_out(rng, entity, partner, sentences, extra, new), entity, slot, decision, value)


def asked_value(rng, entity, slot, decision, partner, pool):
    """The value that the question asks about."""
    if decision == "yes" or (decision == "maybe" and rng.random() < 0.5):
        return entity.slots[slot]
    if partner and rng.random() < 0.65:
        return partner.slots[slot]
    return other_value(rng, entity, slot, pool)


def lay_out(rng, entity, partner, sentences, extra, new):
    """Sections with labels: an opening, then the sentences in two or three groups."""
    opening = [introduce(rng, entity, new)]
    if entity.kind == "condition" and not partner:
        opening.append(describe_findings(rng, entity, new))
    blocks = [sentences[:2], sentences[2:]] if len(sentences) > 2 else [sentences]
    if extra:
        blocks.append(extra)
    if partner and rng.random() < 0.5:
        blocks.reverse()
    blocks = [opening] + [block for block in blocks if block]
    labels = [LABELS_NEW[0] if new else LABELS[0]] + rng.sample((LABELS_NEW if new else LABELS)[1:], len(blocks) - 1)
    return tuple((label, " ".join(block)) for label, block in zip(labels, blocks))
