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
        "say": ["The first test for {e} is {v}.", "In {e}, the usual first test is {v}.", "The first investigation in {e} is {v}.",
                "The work-up of {e} starts with {v}.", "The usual first investigation for {e} is {v}.", "The test done first in {e} is {v}."],
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
        "say": ["The first treatment for {e} is {v}.", "In {e}, treatment starts with {v}.", "For {e}, the usual treatment is {v}.",
                "The first choice of treatment in {e} is {v}.", "Treatment of {e} starts with {v}.", "The treatment given first in {e} is {v}."],
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
        "say": ["The red flag in {e} is {v}.", "The warning sign in {e} is {v}.", "The sign that needs urgent care in {e} is {v}.",
                "The red flag to watch for in {e} is {v}.", "The urgent sign in {e} is {v}.", "In {e}, the danger sign is {v}."],
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
        "say": ["The specialty for {e} is {v}.", "The field that deals with {e} is {v}.", "The usual specialty in {e} is {v}.",
                "The specialty that looks after {e} is {v}.", "In {e}, the specialty is {v}."],
        "say_new": ["The department responsible for {e} is {v}.", "{E} is managed by {v}.", "{E} is covered by {v}.",
                    "Referrals for {e} are sent to {v}."],
        "ask": ["Is {e} looked after by {v}?", "Are people with {e} seen by {v}?", "Does {e} belong to {v}?", "Does {v} look after {e}?"],
        "ask_new": ["Is {e} managed by {v}?", "Are referrals for {e} sent to {v}?", "Is {e} covered by {v}?"],
    },
    "drug_class": {
        "np": ["the class of {e}", "the drug class of {e}", "the group of {e}", "the class that {e} belongs to", "the drug group of {e}"],
        "np_new": ["the family of {e}", "the category that {e} falls into", "the kind of medicine that {e} is"],
        "say": ["The class of {e} is {v}.", "The drug class of {e} is {v}.", "{E} belongs to the class {v}.", "The group of {e} is {v}.",
                "By class, {e} is {a} {v}."],
        "say_new": ["The family of {e} is {v}.", "{E} falls into the category {v}.", "The kind of medicine that {e} is: {v}.",
                    "Pharmacists sort {e} under {v}."],
        "ask": ["Is {e} {a} {v}?", "Is {e} classed as {a} {v}?", "Does {e} belong to the class {v}?", "By class, is {e} {a} {v}?"],
        "ask_new": ["Does {e} fall into the category {v}?", "Do pharmacists sort {e} under {v}?", "Would {e} count as {a} {v}?"],
    },
    "use": {
        "np": ["the main use of {e}", "the usual use of {e}", "the main reason to give {e}", "the main reason for {e}", "the use of {e}"],
        "np_new": ["the chief purpose of {e}", "the leading indication for {e}", "the problem that {e} is prescribed against"],
        "say": ["The main use of {e} is {v}.", "{E} is mainly used for {v}.", "The usual use of {e} is {v}.", "The main reason to give {e} is {v}.",
                "The use of {e} is {v}."],
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
                "The side effect listed for {e} is {v}.", "The usual side effect of {e} is {v}."],
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
                "The main warning for {e} is {v}.", "The caution for {e} is {v}."],
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
        "say": ["The check made during {e} treatment is {v}.", "The usual check with {e} is {v}.", "The thing to monitor with {e} is {v}.",
                "The check needed with {e} is {v}.", "The check for people on {e} is {v}."],
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
CONTRAST = ["{N} is {v} rather than {w}.", "{N} is {v}, not {w}.", "{N} is {v} and not {w}."]
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
    "yes": ["On {n}, the {p} says {v}. The {q} says {w}, so the two agree.", "The {q} says that {n} is {w}. The {p} says {v}, so the two agree."],
    "no": ["On {n}, the {p} says {v}. The {q} says {w}, so the two differ.", "The {q} says that {n} is {w}. The {p} says {v}, so the two differ."],
    "maybe": ["On {n}, the {p} says nothing. The {q} says {w}, so this stays open.", "The {q} says that {n} is {w}. The {p} says nothing, so this stays open."],
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


SPOKEN = {"respiratory": "respiratory medicine"}  # specialty names that do not stand alone in a sentence


def load_facts(folder=".", seed=42):
    """All conditions and drugs with a name in the singular, partitioned by name."""
    entities = []
    for kind, slots in (("condition", CONDITION_SLOTS), ("drug", DRUG_SLOTS)):
        rows = sorted(read_table(Path(folder) / f"{kind}s.csv"), key=lambda row: row[kind])
        rows = [row for row in rows if not plural(row[kind])]
        random.Random(f"{seed}-{kind}").shuffle(rows)
        for position, row in enumerate(rows):
            findings = tuple(row[f"finding_{number}"] for number in (1, 2, 3)) if kind == "condition" else ()
            entities.append(Entity(row[kind], kind, part_of(position / len(rows)), {slot: SPOKEN.get(row[slot], row[slot]) for slot in slots}, row.get("description", ""), findings))
    return entities


def part_of(fraction):
    """The partition that a position in the shuffled list (0 to 1) falls into."""
    edge = 0.0
    for part, share in PARTS:
        edge += share
        if fraction < edge:
            return part
    return PARTS[-1][0]


SINGULAR_S = {"gas", "lens", "measles", "mumps", "rickets", "diabetes", "herpes", "scabies", "rabies", "shingles", "ascites", "pus", "caries"}

SINGULAR_PHRASES = {"alpha and beta blocker", "exposure and response prevention", "fluid and toileting diary", "platelet count and film"}


def plural(phrase):
    """Whether a noun phrase takes a plural verb ("blood cultures" does, "urinalysis" and "loss of vision" do not)."""
    head = phrase.replace("ear nose and throat", "throat")
    for preposition in (" of ", " in ", " with ", " by ", " for ", " to ", " on ", " after ", " from ", " without ", " under ", " at ", " when ", " due ", " over ", " around ", " above ", " up ", " if ", " during ", " until "):
        head = head.split(preposition)[0]
    if phrase in SINGULAR_PHRASES or head.split()[0] in ("stopping", "soaking"):
        return False
    if " and " in head:
        return True
    word = head.split()[-1].lower()
    return word.endswith("s") and not word.endswith(("ss", "is", "us", "ics")) and word not in SINGULAR_S


def article(phrase):
    """"a" or "an", by sound."""
    first = phrase.split()[0]
    if first.isupper() or any(letter.isdigit() for letter in first):
        return "an" if first[0] in "AEFHILMNORSX8" else "a"
    return "an" if first[0].lower() in "aeiou" and not first.lower().startswith(("uni", "uri", "use", "eu")) else "a"


def aged(age):
    """"a 42-year-old", "an 84-year-old"."""
    return f"{'an' if age in (8, 11, 18) or 80 <= age < 90 else 'a'} {age}-year-old"


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


def phrases(slot, what, wording):
    """The names ("np"), sentences ("say") or questions ("ask") of a slot: "train", held out ("new") or pre-training ("wide")."""
    if wording == "new":
        return WORDING[slot][f"{what}_new"]
    return WORDING[slot][what] * 2 + WIDER[slot][what] if wording == "wide" else WORDING[slot][what]


def name_slot(rng, entity, slot, wording="train"):
    """A noun phrase for a slot of an entity ("the first test for gout")."""
    return rng.choice(phrases(slot, "np", wording)).format(e=entity.name)


def state(rng, entity, slot, wording="train", against=None):
    """A sentence that states a slot, here and there with the value that it is not (`against`)."""
    value = entity.slots[slot]
    if against and rng.random() < 0.25:
        return fill(rng.choice(CONTRAST_NEW if wording == "new" else CONTRAST), n=name_slot(rng, entity, slot, wording), v=value, w=against)
    return fill(rng.choice(phrases(slot, "say", wording)), e=entity.name, v=value)


def leave_open(rng, entity, slot, wording="train"):
    """A sentence that says the slot is not stated."""
    return fill(rng.choice(SILENT_NEW if wording == "new" else SILENT), n=name_slot(rng, entity, slot, wording))


def introduce(rng, entity, wording="train"):
    """An opening sentence about an entity."""
    return fill(rng.choice((ABOUT_NEW if wording == "new" else ABOUT)[entity.kind]), e=entity.name, d=entity.description)


def describe_findings(rng, entity, wording="train"):
    """A sentence with typical findings of a condition."""
    first, second = rng.sample(entity.findings, 2)
    return fill(rng.choice(FINDINGS_NEW if wording == "new" else FINDINGS), e=entity.name, f=first, g=second)


def ask(rng, entity, slot, value, wording="train"):
    """A yes/no question about one slot of an entity."""
    if rng.random() < 0.35:
        return fill(rng.choice(phrases(slot, "ask", wording)), e=entity.name, v=value)
    frame = rng.choice(FRAMES_NEW if wording == "new" else FRAMES)
    return fill(frame, n=name_slot(rng, entity, slot, wording), v=value)


SHORT_NAMES = {
    "investigation": "the first test", "treatment": "the first treatment", "red_flag": "the red flag", "specialty": "the specialty", "drug_class": "the class",
    "use": "the main use", "side_effect": "the side effect", "caution": "the main caution", "monitoring": "the check",
}


def compare(rng, entity, slot, decision, value, passage="passage", claim="question", named=True):
    """The reading step: what the passage says on the slot (of the entity, when `named`), what the question says, and how the two stand."""
    name = WORDING[slot]["np"][0].format(e=entity.name) if named else SHORT_NAMES[slot]
    return fill(rng.choice(COMPARE[decision]), n=name, v=entity.slots[slot], w=value, p=passage, q=claim)


@dataclass(frozen=True)
class Reading:
    """A passage and one thing to look up in it."""

    sections: tuple  # ((label, text), ...)
    entity: Entity
    slot: str
    decision: str
    value: str  # the value asked about
    stated: tuple  # ((entity, slot), ...) that the passage states
    entities: tuple  # the one or two entities of the passage


def other_value(rng, entity, slot, pool):
    """A value of the same slot that is wrong for this entity: from another specialty or class, and not one that overlaps it."""
    for _ in range(200):
        other = partner_for(rng, entity, pool)
        if differ(entity.slots[slot], other.slots[slot]):
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


def make_reading(rng, entity, slot, decision, pool, wording="train", partners=0.7):
    """A passage about one or (in a share `partners` of cases) two entities, so that reading it gives the wanted decision."""
    partner = partner_for(rng, entity, pool) if rng.random() < partners else None
    others = [name for name in entity.slots if name != slot]
    own = rng.sample(others, (1 if partner else 2) + (decision == "maybe"))
    partner_states = bool(partner) and rng.random() < 0.8 and differ(partner.slots[slot], entity.slots[slot])
    value = asked_value(rng, entity, slot, decision, partner if partner_states else None, pool)
    against = None
    if decision != "maybe":
        against = value if decision == "no" else other_value(rng, entity, slot, pool)
    sentences = [state(rng, entity, name, wording) for name in own]
    if decision != "maybe":
        sentences.append(state(rng, entity, slot, wording, against))
    opened = rng.random() < (0.35 if decision == "maybe" else 0.20)
    if opened:
        sentences[0] = leave_open(rng, entity, slot if decision == "maybe" else own[0], wording)
    rng.shuffle(sentences)
    about = [slot] if partner_states else []
    about += rng.sample([name for name in others], 1) if partner and (not about or rng.random() < 0.3) else []
    extra = [state(rng, partner, name, wording) for name in about] if partner else []
    rng.shuffle(extra)
    entities = (entity, partner) if partner else (entity,)
    stated = stated_slots(entity, own, slot, decision, opened, partner, about)
    return Reading(lay_out(rng, entity, partner, sentences, extra, wording), entity, slot, decision, value, stated, entities)


def stated_slots(entity, own, slot, decision, opened, partner, about):
    """What the passage states, as (entity, slot) pairs."""
    kept = own[1:] if opened else own
    pairs = [(entity, name) for name in kept] + ([(entity, slot)] if decision != "maybe" else [])
    return tuple(pairs + [(partner, name) for name in about])


def asked_value(rng, entity, slot, decision, partner, pool):
    """The value that the question asks about."""
    if decision == "yes" or (decision == "maybe" and rng.random() < 0.4):
        return entity.slots[slot]
    if partner and rng.random() < 0.8:
        return partner.slots[slot]
    return other_value(rng, entity, slot, pool)


def lay_out(rng, entity, partner, sentences, extra, wording):
    """Sections with labels: an opening, then the sentences in two or three groups."""
    opening = [introduce(rng, entity, wording)]
    if entity.kind == "condition" and not partner and rng.random() < 0.5:
        opening.append(describe_findings(rng, entity, wording))
    blocks = [sentences[:2], sentences[2:]] if len(sentences) > 2 else [sentences]
    if extra:
        blocks.append(extra)
    if partner and rng.random() < 0.5:
        blocks.reverse()
    blocks = [opening] + [block for block in blocks if block]
    names = LABELS_NEW if wording == "new" else LABELS
    labels = [names[0]] + rng.sample(names[1:], len(blocks) - 1)
    return tuple((label, " ".join(block)) for label, block in zip(labels, blocks))


# ---- the pre-training text: statements only ----

# Further names and sentences, used in the pre-training text only. They carry words of the held-out wording in other constructions.
WIDER = {
    "investigation": {"np": ["the initial step in the work-up of {e}", "the opening test when {e} is possible", "what is ordered first for {e}", "the investigation that leads in {e}"],
                      "say": ["{V} {is} the first test for {e}.", "Doctors start with {v} when they suspect {e}.", "When {e} is suspected, {v} {is} done first.", "For {e}, clinics ask for {v} first.", "A doctor who thinks of {e} asks for {v} first.",
                     "Initially, {e} calls for {v}.", "The initial step in the work-up of {e} is {v}.", "Clinics that look into {e} order {v} first.",
                              "At the outset, {v} {is} requested for {e}.", "The diagnosis of {e} begins with {v}."]},
    "treatment": {"np": ["the therapy for {e}", "the initial therapy in {e}", "the remedy given in {e}", "what is offered first for {e}"],
                  "say": ["{V} {is} the usual first treatment of {e}.", "{E} is usually treated with {v}.", "People with {e} are given {v} first.", "Doctors treat {e} with {v}.",
                     "Therapy for {e} begins with {v}.", "The initial treatment of {e} is {v}.", "Someone with {e} is offered {v} first.",
                          "The remedy preferred in {e} is {v}.", "At the outset of {e}, patients receive {v}."]},
    "red_flag": {"np": ["the alarm feature in {e}", "the sign for which people with {e} return at once", "the worrying sign of {e}", "what raises the alarm in {e}"],
                 "say": ["In {e}, {v} {means} urgent care.", "People with {e} should watch for {v}.", "{V} {is} the danger sign in {e}.", "With {e}, {v} {calls} for help the same day.", "Anyone with {e} and {v} needs urgent care.",
                     "In {e}, the alarm is raised by {v}.", "People with {e} should return at once for {v}.", "A worrying sign of {e} is {v}.",
                         "{V} in {e} should bring immediate help.", "Someone with {e} comes back immediately with {v}."]},
    "specialty": {"np": ["the department for {e}", "the branch that manages {e}", "the service for {e}", "the department to which {e} is sent"],
                  "say": ["{E} is looked after by {v}.", "People with {e} are seen by {v}.", "{V} is the specialty that looks after {e}.", "{E} belongs to {v}.", "{V} looks after {e}.",
                     "The department for {e} is {v}.", "Patients with {e} are sent to {v}.", "The branch of medicine for {e} is {v}.", "{V} manages {e}.",
                          "The service responsible in {e} is {v}."]},
    "drug_class": {"np": ["the family that {e} comes from", "the kind of drug that {e} is", "the category of {e}", "how {e} is sorted"],
                   "say": ["{E} is {a} {v}.", "{E} is classed as {a} {v}.", "Doctors know {e} as {a} {v}.",
                     "{E} comes from the family {v}.", "The category of {e} is {v}.", "In the pharmacy, {e} is sorted under {v}.", "{E} counts as {a} {v}.",
                           "{E} is {a} {v} by kind."]},
    "use": {"np": ["the purpose of {e}", "the indication for {e}", "what {e} is prescribed for", "the chief use of {e}"],
            "say": ["Doctors give {e} mainly for {v}.", "People take {e} mainly for {v}.", "{E} is mostly given for {v}.",
                     "The purpose of {e} is {v}.", "{E} is prescribed for {v}.", "The chief indication for {e} is {v}.", "{E} is taken against {v}.",
                    "Above all, {e} helps with {v}."]},
    "side_effect": {"np": ["the unwanted effect of {e}", "the adverse effect of {e}", "the complaint of people on {e}", "the effect that {e} may bring"],
                    "say": ["{E} can cause {v}.", "People who take {e} may notice {v}.", "With {e}, {v} may follow.",
                     "{E} may bring {v}.", "An unwanted effect of {e} is {v}.", "{V} {is} reported by patients who take {e}.", "The adverse effect listed with {e} is {v}.",
                            "The complaint that follows {e} is {v}."]},
    "caution": {"np": ["the contraindication to {e}", "the setting in which {e} is avoided", "the reason to hesitate over {e}", "the situation against {e}"],
                "say": ["Before {e} is started, doctors ask about {v}.", "{E} carries a caution about {v}.", "Care is needed when {e} meets {v}.",
                     "{E} is avoided in {v}.", "A contraindication to {e} is {v}.", "Doctors hesitate to prescribe {e} in {v}.", "{V} {is} the reason to avoid {e}.",
                        "The setting that calls for caution with {e} is {v}."]},
    "monitoring": {"np": ["the measurement made while on {e}", "the follow-up of {e}", "the item to review with {e}", "what clinics watch with {e}"],
                   "say": ["During {e} treatment, doctors check {v}.", "People on {e} have a check of {v}.", "With {e}, doctors monitor {v}.",
                     "While {e} is taken, clinics review {v}.", "The follow-up of {e} is {v}.", "Visits of people on {e} are for {v}.", "Clinics measure {v} with {e}.",
                           "The item to follow with {e} is {v}."]},
}
CLAIMS = ["The {q} says that {n} is {w}.", "The {q} names {w} as {n}.", "The {q} asks whether {n} is {w}.", "The {q} asks whether the {p} names {w} as {n}.",
          "The {q} wonders whether {n} would be {w}.", "The {q} takes {w} as {n}.", "According to the {q}, {n} is {w}.", "In the {q}, {w} {is_w} put forward as {n}.",
          "The {q} calls {w} {n}.", "The {q} gives {w} as {n}.", "It is {w} that the {q} describes as {n}.", "The {q} points to {w} as {n}."]
READERS = ["card", "claim", "label", "draft", "student", "message", "entry", "letter"]
SOURCES = ["passage", "note", "text", "report", "extract", "summary", "leaflet", "passage"]
SOUNDS = ["ba", "be", "bor", "ca", "cel", "cor", "da", "del", "dor", "fa", "fen", "ga", "gal", "hel", "ka", "kel", "la", "lev", "lo", "ma", "mel", "mor", "na", "ner", "no",
          "pa", "pel", "por", "ra", "ren", "ro", "sa", "sel", "sor", "ta", "tel", "tor", "va", "ven", "vo", "za", "zel", "xi", "phy", "thra", "gly", "cra", "bri", "stel", "quin"]
DISEASE_ENDS = ["itis", "osis", "oma", "aemia", "pathy", "algia", "uria", "ia", "iasis", "rrhoea", "plasia", "syndrome"]
DRUG_ENDS = ["olol", "pril", "sartan", "statin", "azole", "ine", "ide", "mab", "cillin", "mycin", "oxacin", "amide", "idine", "afil", "gliptin", "parin", "one", "ate"]
QUALIFIERS = ["acute", "chronic", "early", "mild", "severe", "late", "primary", "viral", "bacterial", "simple", "deep", "upper", "lower", "central", "congenital", "juvenile"]
PLACES = ["knee", "hip", "eye", "ear", "throat", "skin", "heart", "lung", "kidney", "bladder", "liver", "bowel", "stomach", "back", "neck", "hand", "foot", "scalp", "jaw",
          "brain", "nerve", "bone", "joint", "blood", "spleen", "chest", "calf", "wrist", "ankle", "shoulder", "tongue", "nose", "thyroid", "womb", "breast", "pelvis"]
SENSES = ["pain", "swelling", "redness", "numbness", "weakness", "itching", "bleeding", "stiffness", "burning", "bruising", "rash", "lump", "cramps", "tenderness", "ulcers", "dryness"]
MANNERS = ["sudden", "spreading", "severe", "slow", "mild", "painful", "painless", "new", "constant", "sharp", "dull", "hot", "cold", "swollen", "pale", "dark", "rapid", "repeated"]
TESTS = ["scan", "ultrasound", "X-ray", "biopsy", "culture", "swab", "smear", "count", "level", "panel", "function tests", "MRI", "CT", "endoscopy", "microscopy", "antibody test",
         "pressure reading", "tracing", "stain", "angiography", "examination"]
WAYS = ["oral", "inhaled", "topical", "intravenous", "high-dose", "low-dose", "weekly", "daily", "urgent", "planned", "surgical", "supervised", "nasal", "long-term", "short-course"]
CURES = ["rest", "drainage", "removal", "repair", "fluids", "antibiotics", "steroids", "massage", "exercises", "dressing", "splint", "oxygen", "drops", "cream", "diet", "injection",
         "replacement", "counselling", "painkillers", "iron", "transfusion"]
RISKS = ["pregnancy", "asthma", "epilepsy", "glaucoma", "gout", "old age", "driving", "alcohol use", "a slow pulse", "kidney disease", "liver disease", "heart block", "low sodium",
         "high potassium", "breast feeding", "a peptic ulcer", "dehydration", "surgery"]
CHECKS = ["pulse", "weight", "blood pressure", "potassium", "sodium", "liver function", "kidney function", "blood count", "mood", "growth", "bone density", "eyesight", "drug level",
          "glucose", "calcium", "cholesterol", "hearing", "temperature"]


def fragments_of(entities):
    """Words of the entities' facts, and pieces cut from them, to build names and values that were never seen."""
    words = sorted({word for entity in entities for text in (entity.name, entity.description, *entity.slots.values(), *entity.findings)
                    for word in text.replace("-", " ").split() if word.isalpha() and len(word) > 2})
    pieces = sorted({word[start:start + size].lower() for word in words for size in (2, 3, 4, 5, 6) for start in (0, len(word) - size) if len(word) >= size + 2})
    return words, pieces


def odd_name(rng, pieces):
    """A made-up word from two or three pieces of real words."""
    return "".join(rng.sample(pieces, rng.choice((2, 2, 3))))


def odd_value(rng, words, pieces):
    """One to four words in no sensible order, one of them made up now and then."""
    chosen = rng.sample(words, rng.choice((1, 2, 2, 3, 3, 4)))
    return " ".join(odd_name(rng, pieces) if rng.random() < 0.25 else word for word in chosen)


def invent_name(rng, kind):
    """A name that no condition or drug has."""
    stem = "".join(rng.sample(SOUNDS, rng.choice((1, 2, 2, 3))))
    if kind == "drug":
        return stem + rng.choice(DRUG_ENDS)
    ending = rng.choice(DISEASE_ENDS)
    name = f"{cap(stem)} {ending}" if ending == "syndrome" else rng.choice((stem + ending, stem + ending, f"{rng.choice(PLACES)} {stem}{ending}", f"{rng.choice(PLACES)} {stem}"))
    return f"{rng.choice(QUALIFIERS)} {name}" if rng.random() < 0.3 else name


def invent_value(rng, slot):
    """A made-up but readable value of a slot."""
    place, manner, sense = rng.choice(PLACES), rng.choice(MANNERS), rng.choice(SENSES)
    choices = {
        "investigation": (f"{place} {rng.choice(TESTS)}", f"{manner} {place} {rng.choice(TESTS)}", f"{invent_name(rng, 'drug')} level", f"{place} {rng.choice(TESTS)}"),
        "treatment": (f"{rng.choice(WAYS)} {invent_name(rng, 'drug')}", f"{rng.choice(WAYS)} {rng.choice(CURES)}", f"{place} {rng.choice(CURES)}", invent_name(rng, "drug")),
        "red_flag": (f"{manner} {sense} of the {place}", f"{manner} {place} {sense}", f"{sense} with {rng.choice(SENSES)}", f"loss of {rng.choice(('sight', 'hearing', 'speech', 'feeling', 'balance'))}"),
        "drug_class": (f"{place} {rng.choice(('blocker', 'relaxant', 'agonist', 'inhibitor', 'antibiotic'))}", f"{''.join(rng.sample(SOUNDS, 2))} {rng.choice(('blocker', 'inhibitor', 'derivative', 'agonist'))}"),
        "use": (f"{place} {sense}", invent_name(rng, "condition"), f"{manner} {sense}"),
        "side_effect": (f"{manner} {sense}", f"{place} {sense}", f"{manner} {place}s", sense),
        "caution": (rng.choice(RISKS), invent_name(rng, "condition"), f"{manner} {sense}", f"a {manner} {place}"),
        "monitoring": (rng.choice(CHECKS), f"{place} {rng.choice(TESTS)}", f"{rng.choice(CHECKS)} and {rng.choice(PLACES)}", f"{invent_name(rng, 'drug')} level"),
    }
    return rng.choice(choices[slot])


def invent_entity(rng, kind, known, specialties, words, pieces):
    """An entity that does not exist, with values that are borrowed from the known entities, made up, or odd."""
    slots = {}
    for slot in CONDITION_SLOTS if kind == "condition" else DRUG_SLOTS:
        borrowed = rng.choice(known[kind]).slots[slot]
        value = rng.choice((borrowed, borrowed, invent_value(rng, slot) if slot != "specialty" else borrowed, odd_value(rng, words, pieces)))
        slots[slot] = rng.choice(specialties) if slot == "specialty" and rng.random() < 0.6 else value
    findings = tuple(f"{rng.choice(MANNERS)} {place} {rng.choice(SENSES)}" for place in rng.sample(PLACES, 3))
    text = f"{rng.choice(SENSES)} of the {rng.choice(PLACES)} {rng.choice(('caused by', 'that follows', 'after', 'linked to'))} {rng.choice(MANNERS)} {rng.choice(SENSES)}"
    name = invent_name(rng, kind)
    if rng.random() < 0.65:
        name = " ".join([odd_name(rng, pieces)] + ([rng.choice((rng.choice(words), odd_name(rng, pieces)))] if kind == "condition" and rng.random() < 0.6 else []))
    return Entity(name, kind, "train", slots, text, findings)


def claim_about(rng, reading, pool):
    """One more (entity, slot, decision, value) about a passage."""
    entity = rng.choice(reading.entities)
    stated = [slot for owner, slot in reading.stated if owner is entity]
    decision = rng.choice(("yes", "no", "maybe"))
    wanted = [slot for slot in entity.slots if (slot in stated) == (decision != "maybe")]
    if not wanted:
        return None
    slot = rng.choice(wanted)
    twin = [owner for owner, name in reading.stated if owner is not entity and name == slot and differ(owner.slots[slot], entity.slots[slot])]
    return entity, slot, decision, asked_value(rng, entity, slot, decision, twin[0] if twin else None, pool)


def claim_sentence(rng, entity, slot, value, source, reader):
    """A statement of what somebody claims about a slot."""
    names = WORDING[slot]["np"] + (WIDER[slot]["np"] if rng.random() < 0.5 else [])
    if rng.random() < 0.35:
        sentence = fill(rng.choice(WORDING[slot]["say"] + WIDER[slot]["say"]), e=entity.name, v=value)
        return f"The {reader} reads: {sentence}"
    name = rng.choice(names).format(e=entity.name)
    return fill(rng.choice(CLAIMS), n=name, w=value, p=source, q=reader, is_w="are" if plural(value) else "is")


def reading_document(rng, pool, partners):
    """A passage, then what others claim about it, each compared with the passage."""
    entity = rng.choice(pool)
    slot = rng.choice(list(entity.slots))
    decision = rng.choice(("yes", "no", "maybe"))
    reading = make_reading(rng, entity, slot, decision, pool, "wide", partners)
    lines = [f"{label}: {text}" if rng.random() < 0.9 else text for label, text in reading.sections]
    passage = "\n".join(lines) if rng.random() < 0.75 else " ".join(text for _, text in reading.sections)
    claims = [(entity, slot, decision, reading.value)] + [claim_about(rng, reading, pool) for _ in range(rng.choice((2, 3, 4)))]
    claims = [claim for claim in claims if claim]
    rng.shuffle(claims)
    source = rng.choice(SOURCES)
    parts = [passage]
    for reader, (owner, name, verdict, value) in zip(rng.sample(READERS, len(claims)), claims):
        parts.append(claim_sentence(rng, owner, name, value, source, reader))
        parts.append(compare(rng, owner, name, verdict, value, source, reader))
    return "\n\n".join(parts)


TRAITS = ["colour", "owner", "price", "weight", "home town", "tool", "size", "shape", "name", "age", "maker", "smell", "sound", "chief purpose", "main use", "first job", "usual place",
          "opening hour", "latest order", "final decision", "leading idea", "hidden cost", "best season", "worst fault", "preferred road", "category", "family", "warning", "helper"]
THINGS = ["shop", "boat", "garden", "bridge", "clock", "mill", "school", "lamp", "train", "ward", "library", "kitchen", "market", "cart", "well", "clinic", "office", "tower", "farm", "ship"]
TRAIT_WORDS = ["red", "blue", "green", "small", "large", "round", "flat", "heavy", "light", "old", "young", "seven", "nine", "forty", "wood", "stone", "iron", "glass", "bread", "salt",
               "north", "south", "winter", "summer", "spring", "noon", "dawn", "quiet", "loud", "sweet", "bitter", "simple", "broken", "clean", "narrow", "wide", "yes", "no", "maybe"]


def trait_document(rng):
    """The same reading skill away from medicine: things, their traits, and claims about them."""
    things = [f"the {thing} of {cap(''.join(rng.sample(SOUNDS, 2)))}" for thing in rng.sample(THINGS, 2)]
    facts = {}
    for thing in things:
        for trait in rng.sample(TRAITS, 3):
            facts[f"the {trait} of {thing}"] = f"{rng.choice(TRAIT_WORDS)} {rng.choice(TRAIT_WORDS)}" if rng.random() < 0.6 else str(rng.randint(2, 999))
    names = list(facts)
    rng.shuffle(names)
    hidden = names.pop()
    text = " ".join(fill(rng.choice(["{N} is {v}.", "{V} is {n}.", "We know that {n} is {v}.", "It is {v} that serves as {n}."]), n=name, v=facts[name]) for name in names)
    source, parts = rng.choice(SOURCES), []
    for reader in rng.sample(READERS, 3):
        decision = rng.choice(("yes", "no", "maybe"))
        name = hidden if decision == "maybe" else rng.choice(names)
        wrong = [value for value in facts.values() if differ(value, facts[name])] or ["nothing new"]
        value = facts[name] if decision == "yes" else rng.choice(wrong)
        parts.append(fill(rng.choice(CLAIMS), n=name, w=value, p=source, q=reader, is_w="is"))
        parts.append(fill(rng.choice(COMPARE[decision]), n=name, v=facts[name], w=value, p=source, q=reader))
    return "\n\n".join([text] + parts)


def textbook_document(rng, entity, wording="wide"):
    """Plain sentences with the facts of one entity, then some of them restated."""
    sentences = [introduce(rng, entity, wording)] + ([describe_findings(rng, entity, wording)] if entity.findings else [])
    slots = list(entity.slots)
    rng.shuffle(slots)
    sentences += [state(rng, entity, slot, wording) for slot in slots]
    sentences.append(rng.choice(("In short: ", "Put another way: ", "To repeat: ")) + state(rng, entity, slots[0], wording))
    return " ".join(sentences)


PEOPLE = ["man", "woman", "teacher", "farmer", "nurse", "driver", "student", "cook", "clerk", "builder"]
OPENINGS = ["came to the clinic with", "had", "was seen with", "wrote about", "noticed", "told the doctor about"]


def case_document(rng, entity):
    """The story of a patient, what the team thought, and what was done."""
    person, age = rng.choice(PEOPLE), rng.randint(18, 88)
    if entity.kind == "drug":
        return (f"{cap(aged(age))} {person} takes {entity.name} for {entity.slots['use']}. {cap(entity.name)} is {article(entity.slots['drug_class'])} {entity.slots['drug_class']}. "
                f"Later there was {entity.slots['side_effect']}. The leaflet lists {entity.slots['side_effect']} with {entity.name}, so the two fit. "
                f"The team checks {entity.slots['monitoring']} and thinks about {entity.slots['caution']}.\n\nIn short, the {person} of {age} takes {entity.name}, "
                f"has {entity.slots['side_effect']}, and needs {entity.slots['monitoring']} checked.")
    found = rng.sample(entity.findings, 3)
    first, second, third = found
    return (f"{cap(aged(age))} {person} {rng.choice(OPENINGS)} {first}, {second} and {third}. The team thought of {entity.name}. "
            f"The guide puts {entity.slots['investigation']} first and then {entity.slots['treatment']}. {cap(entity.slots['red_flag'])} would call for urgent care.\n\n"
            f"The {person} is {age} and has {first}, {second} and {third}. These findings fit {entity.name}. The first test is {entity.slots['investigation']}. "
            f"If it supports {entity.name}, treatment starts with {entity.slots['treatment']}. The {person} will come back at once for {entity.slots['red_flag']}.")


def drill_document(rng, words, pieces):
    """Lists and codes read twice."""
    items = [odd_value(rng, words, pieces) if rng.random() < 0.7 else invent_value(rng, "red_flag") for _ in range(rng.randint(3, 6))]
    listed = ", ".join(items)
    return rng.choice([f"The list reads: {listed}. Read again, the list is: {listed}. The first item is {items[0]} and the last is {items[-1]}.",
                       f"{cap(listed)}. To repeat: {listed}.", " ".join(f"We read {item}, and the copy reads {item}." for item in items)])


PAIRS = ["One chart says {v} and the other says {w}, so the two {x}.", "First {v}, then {w}: the two {x}.", "The {p} says {v}. The {q} says {w}, so the two {x}.",
         "On {n}, the {p} says {v}. The {q} says {w}, so the two {x}.", "The {q} says that {n} is {w}. The {p} says {v}, so the two {x}."]


def pair_value(rng, words, pieces, easy):
    """One side of a pair: a single word (with probability `easy`), else a longer or odder value."""
    if rng.random() < easy:
        return rng.choice(TRAIT_WORDS)
    if rng.random() < easy:
        return rng.choice(words)
    if rng.random() < 0.6:
        return odd_value(rng, words, pieces)
    return invent_value(rng, rng.choice(("investigation", "treatment", "red_flag", "side_effect", "monitoring")))


def pairs_document(rng, words, pieces, easy):
    """Pairs of values that agree or differ."""
    lines = []
    for _ in range(rng.randint(3, 8)):
        value = pair_value(rng, words, pieces, easy)
        other = value if rng.random() < 0.5 else pair_value(rng, words, pieces, easy)
        lines.append(fill(rng.choice(PAIRS), n=f"the {rng.choice(TRAITS)} of {odd_name(rng, pieces)}", v=value, w=other, p=rng.choice(SOURCES), q=rng.choice(READERS),
                          x="agree" if value == other else "differ"))
    return " ".join(lines)


GENERAL = ["A test can rule a disease in or out, but no test is perfect.", "To start with means to do first; an initial step is a first step.", "Therapy is another word for treatment.",
           "A remedy is a treatment, and a medicine is a drug.", "A question is answered yes, no or maybe.", "The final decision was left to the patient and the family.",
           "An adverse effect is an unwanted effect of a drug.", "Maybe it will rain tonight; maybe it will stay dry.", "The nurse said yes, the porter said no, and the clerk said maybe.",
           "A contraindication is a reason against giving a drug.", "The day will end with a walk by the river.", "Doctors listen, look, feel and then decide.", "Thank you for the letter, wrote the teacher.",
           "I hope you are well, the letter said, and please write soon.", "An alarm sign is a warning sign.", "A note that says nothing on a point leaves the point open.",
           "Notes that name the same thing agree, and notes that name different things differ.", "Hello, said the doctor, and please sit down.", "We think before we speak, and we read before we judge.",
           "The purpose of a drug is its use.", "Reports describe what was seen; summaries describe what matters.", "The library is open on most days and closed on the others."]


def general_document(rng):
    """A few general sentences, some with numbers and names."""
    lines = rng.sample(GENERAL, 4)
    person, town = cap("".join(rng.sample(SOUNDS, 2))), cap("".join(rng.sample(SOUNDS, 2)))
    lines.append(f"{person} walked from {town} to the {rng.choice(THINGS)} in {rng.randint(2, 59)} minutes, and {person} came back to {town} later.")
    rng.shuffle(lines)
    return " ".join(lines)


KINDS = ("reading", "trait", "textbook", "case", "drill", "pairs", "general")
EARLY, LATER = (6, 3, 3, 3, 15, 70, 0), (71, 5, 4, 9, 4, 5, 2)  # the first documents are mostly short pairs to compare and lists to copy


def corpus(seed, folder=".", facts_seed=42, early=6500, partners=0.15):
    """An endless stream of pre-training documents; only facts of the training partition are in it."""
    rng = random.Random(f"{seed}-corpus")
    entities = load_facts(folder, facts_seed)
    names = {entity.name.lower() for entity in entities}
    train = [entity for entity in entities if entity.part == "train"]
    known = {kind: [entity for entity in train if entity.kind == kind] for kind in ("condition", "drug")}
    specialties = sorted({entity.slots["specialty"] for entity in known["condition"]})
    words, pieces = fragments_of(train)
    count = 0
    while True:
        invented = [invent_entity(rng, kind, known, specialties, words, pieces) for kind in ("condition", "drug") for _ in range(24)]
        invented = [entity for entity in invented if entity.name.lower() not in names]
        for _ in range(40):
            pool = invented if rng.random() < 0.8 else train
            kind = rng.choices(KINDS, EARLY if count < early else LATER)[0]
            yield make_document(rng, kind, pool, train, words, pieces, 0.5 if count < early else 0.2, partners)
            count += 1


def make_document(rng, kind, pool, train, words, pieces, easy, partners):
    """One document of a kind."""
    if kind == "reading":
        return reading_document(rng, pool, partners)
    if kind == "textbook":
        return textbook_document(rng, rng.choice(train))
    if kind == "case":
        return case_document(rng, rng.choice(pool))
    if kind == "drill":
        return drill_document(rng, words, pieces)
    if kind == "pairs":
        return pairs_document(rng, words, pieces, easy)
    return trait_document(rng) if kind == "trait" else general_document(rng)
