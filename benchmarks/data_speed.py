"""How long rows of HealthCareMagic shape take from JSON Lines to scrubbed, cleaned, split, tokenised and checked Arrow.

python benchmarks/data_speed.py                    112,165 generated rows on two processes; writes benchmarks/results/data_speed.json
python benchmarks/data_speed.py --rows 336495      three times the rows: time should grow three times, memory hardly
python benchmarks/data_speed.py --rows 1121650     ten times the rows: memory should stay where it is
python benchmarks/data_speed.py --leaks            with the near-duplicate search, which keeps the texts in memory: its price is shown apart
python benchmarks/data_speed.py --prepare          also `medibuddy prepare` as a user calls it: all rows in memory, leak search, files of a run directory
python benchmarks/data_speed.py --compare          also the plain `datasets.map` way for the part both do (read, render, tokenise)

Every row of the result says how busy the machine was (load average at the start; `--note` for words).
Times are wall-clock seconds and, since a busy machine stretches those, processor seconds over all processes.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow

import medibuddy
from medibuddy.data.chat import encode_all
from medibuddy.data.cleaning import clean, content_key
from medibuddy.data.sources import adapt_rows
from medibuddy.data.splits import draw
from medibuddy.hardware import describe_environment

RESULTS = Path(__file__).parent / "results" / "data_speed.json"
MODEL = Path(medibuddy.__file__).parent / "embedded" / "model"
CHUNK = 1000  # rows handed to a process at a time
MAX_SEQ_LENGTH = 2048
SCHEMA = pyarrow.schema([("id", pyarrow.string()), ("split", pyarrow.string()), ("input_ids", pyarrow.list_(pyarrow.int32())), ("labels", pyarrow.list_(pyarrow.int32()))])
SYLLABLES = "ba ke lo mi nu ra sho ti ve za dri gan hel jor pre con ter min al is en or as un ex".split()


def generate(path: Path, rows: int) -> None:
    "Dialogues of realistic length (about 1,000 characters) whose words have a natural spread; one in twenty carries names and numbers"
    generator = random.Random(0)
    words = list(dict.fromkeys("".join(generator.choice(SYLLABLES) for _ in range(1 + min(4, number // 400 + generator.randint(0, 1)))) for number in range(40_000)))
    weights = list(itertools.accumulate(1 / (number + 3) for number in range(len(words))))

    def sentences(low: int, high: int) -> str:
        return ". ".join(" ".join(generator.choices(words, cum_weights=weights, k=generator.randint(8, 14))).capitalize() for _ in range(generator.randint(low, high)))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            person = f" My name is John Smith, call 555-{generator.randint(100, 999)}-{generator.randint(1000, 9999)}." if generator.random() < 0.05 else ""
            question = f"Hello doctor. {sentences(2, 6)}. I am {generator.randint(20, 80)} years old and take {generator.randint(1, 9) * 50} mg.{person}"
            answer = f"Hi, Thanks for your query. {sentences(3, 7)}. Hope this helps. Regards."
            file.write(json.dumps({"instruction": "If you are a doctor, please answer.", "input": question, "output": answer}) + "\n")


def chunks(path: Path):
    "Lines of the file, a thousand at a time"
    with open(path, encoding="utf-8") as file:
        while lines := list(itertools.islice(file, CHUNK)):
            yield lines


def start_worker() -> None:
    "Each process has one thread and its own tokenizer"
    global tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)


def work(job):
    "One chunk: adapt, clean, scrub, split, encode, check"
    lines, keep_texts = job
    examples, unread = adapt_rows(((f"line {number}", json.loads(line)) for number, line in enumerate(lines, 1)), "healthcaremagic", "generated rows")
    cleaned = clean(examples)
    encoded, dropped, _ = encode_all(cleaned.examples, tokenizer, MAX_SEQ_LENGTH)
    rows = {row.id: row for row in cleaned.examples}
    keys = [hashlib.blake2b(repr(content_key(rows[row.id])).encode(), digest_size=12).digest() for row in encoded]
    splits = [draw(rows[row.id], (0.8, 0.1, 0.1)) for row in encoded]
    batch = pyarrow.record_batch([[row.id for row in encoded], splits, [row.input_ids for row in encoded], [row.labels for row in encoded]], schema=SCHEMA)
    return batch, keys, len(unread) + len(cleaned.dropped) + len(dropped), list(rows.values()) if keep_texts else []


def ours(path: Path, folder: Path, leaks: bool) -> dict:
    "The checked way, on two processes"
    from medibuddy.data.leaks import find_leaks

    seen: set[bytes] = set()
    counts, kept = {"rows_out": 0, "duplicates": 0, "dropped": 0}, []
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(2, start_worker) as pool, pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as file, pyarrow.ipc.new_file(file, SCHEMA) as writer:
        # few chunks in flight, or fast reading would fill the memory with them
        for batch, keys, dropped, examples in pool.imap(work, ((lines, leaks) for lines in chunks(path)), chunksize=1):
            fresh = [key not in seen for key in keys]
            seen.update(keys)
            writer.write_batch(batch.filter(pyarrow.array(fresh)))
            counts["rows_out"] += sum(fresh)
            counts["duplicates"] += len(fresh) - sum(fresh)
            counts["dropped"] += dropped
            kept += examples
        pool.close()
        pool.join()
    facts = counts | {"seconds": round(time.perf_counter() - started, 1)}
    if leaks:
        started = time.perf_counter()
        splits = {name: [row for row in kept if draw(row, (0.8, 0.1, 0.1)) == name] for name in ("train", "test")}
        facts |= {"leaks": len(find_leaks(splits["train"], splits["test"])), "leak_seconds": round(time.perf_counter() - started, 1)}
    return facts


def plain(path: Path) -> dict:
    "`datasets.map` on two processes for the part both do: read, render, tokenise; nothing cleaned, scrubbed or checked"
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def encode(row):
        messages = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
        return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache).map(encode, num_proc=2)
        return {"rows_out": len(rows), "seconds": round(time.perf_counter() - started, 1)}


def prepare(path: Path, folder: Path) -> dict:
    "`medibuddy prepare`: cleaned, scrubbed, split, fitted and leak-checked rows in a run directory"
    command = [sys.executable, "-m", "medibuddy", "prepare", "--data", str(path), "--shape", "healthcaremagic", "--run", str(folder / "run"), "--set", f"max_seq_length={MAX_SEQ_LENGTH}", "--drop-leaks", "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    account = json.loads(done.stdout)
    return {"rows_out": account["rows_out"], "dropped": account["dropped"], "leaks": account["leaks"], "seconds": round(time.perf_counter() - started, 1)}


class PeakMemory:
    "Samples the memory of this process and its children, shared pages counted once (PSS), twice a second"

    def __enter__(self):
        self.megabytes, self.stop = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        me = psutil.Process()
        while not self.stop.wait(0.5):
            try:
                used = sum(process.memory_full_info().pss for process in (me, *me.children(recursive=True)))
                self.megabytes = max(self.megabytes, used / 1e6)
            except psutil.Error:
                continue  # a worker ended between listing and asking

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join()


def processor_seconds() -> float:
    "Processor time of this process and of those it has waited for"
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def main() -> None:
    "Generate, measure, write"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=112_165)
    parser.add_argument("--leaks", action="store_true", help="search near-duplicates too")
    parser.add_argument("--note", default="", help="what else the machine was doing, written into the result")
    parser.add_argument("--prepare", action="store_true", help="run `medibuddy prepare` too")
    parser.add_argument("--compare", action="store_true", help="run the plain datasets.map way too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "rows.jsonl", options.rows)
        before, load = processor_seconds(), os.getloadavg()
        with PeakMemory() as memory:
            facts = ours(folder / "rows.jsonl", folder, options.leaks)
        facts["processor_seconds"] = round(processor_seconds() - before, 1)
        facts["peak_memory_mb"] = round(memory.megabytes)
        facts["arrow_mb"] = round((folder / "rows.arrow").stat().st_size / 1e6)
        facts["milliseconds_per_row"] = round(1000 * facts["seconds"] / options.rows, 3)
        result = {"environment": describe_environment(), "rows": options.rows, "load_average_before": load, "note": options.note, "medibuddy": facts}
        if options.prepare:
            before = processor_seconds()
            with PeakMemory() as memory:
                result["prepare_command"] = prepare(folder / "rows.jsonl", folder)
            result["prepare_command"] |= {"processor_seconds": round(processor_seconds() - before, 1), "peak_memory_mb": round(memory.megabytes)}
        if options.compare:
            before = processor_seconds()
            result["datasets_map"] = plain(folder / "rows.jsonl")
            result["datasets_map"]["processor_seconds"] = round(processor_seconds() - before, 1)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[f"{options.rows} rows{' with leak search' if options.leaks else ''}"] = result
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2))


if __name__ == "__main__":
    main()
