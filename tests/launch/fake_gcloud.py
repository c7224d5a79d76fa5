"""Plays `gcloud` for tests of launch/tpu.py, as a scenario says, and notes every call.

The directory of $FAKE_GCLOUD holds scenario.json:

    hosts    workers of a TPU
    create   per create call: null, or {"rc", "err"}; then null
    lives    per TPU that was created: {
        states   per describe: a queue's state, or a node's, or GONE for a queue that
                 is ACTIVE without its node; the last one stays
        run      per `state` after `start`: running, running@STEP, done, exit:N, absent,
                 stopped, or a list of these, one a worker; the last one stays
        ssh      per verb of worker.py (setup, scp too) a list, one item a call:
                 null, {"rc", "err"}, or {"answers": {WORKER: null or changes}}
    }
    exists   whether the first life is there already, and its run started

and receives calls.jsonl. Everything that is not known ends with status 99.
"""

# Hundreds of these processes run in a test session, so few modules are loaded.
import json
import os
import sys

NODE_STATES = (
    "GONE",
    "READY",
    "CREATING",
    "PREEMPTED",
    "TERMINATED",
    "STOPPED",
    "DELETING",
)


def main(words):
    with open(place("scenario.json")) as file:
        scenario = json.load(file)
    memory = recall(scenario)
    with open(place("calls.jsonl"), "a") as file:
        file.write(json.dumps(words) + "\n")
    if words[:2] != ["compute", "tpus"]:
        sys.exit(99)
    group, verb, *rest = words[2:]
    if verb == "create":
        result = create(scenario, memory)
    elif verb == "delete":
        memory["here"] = False
        result = 0, "", ""
    elif not memory["here"]:
        result = 1, "", f"ERROR: (gcloud.{group}.{verb}) NOT_FOUND: no {rest[0]}\n"
    elif verb == "describe":
        result = describe(scenario, memory, group)
    elif verb in ("ssh", "scp"):
        result = over_ssh(scenario, memory, verb, rest)
    else:
        result = 99, "", f"fake gcloud knows no {verb}\n"
    with open(place("memory.json"), "w") as file:
        json.dump(memory, file)
    status, out, error = result
    print(out, end="")
    print(error, end="", file=sys.stderr)
    sys.exit(status)


def place(name):
    return os.path.join(os.environ["FAKE_GCLOUD"], name)


def recall(scenario):
    if os.path.exists(place("memory.json")):
        with open(place("memory.json")) as file:
            return json.load(file)
    exists = scenario.get("exists", False)
    life, start = (0, True) if exists else (-1, False)
    return dict(here=exists, life=life, started=start, ready=start, seen={})


def turn(memory, key, items):
    """Return the next of the items, then None."""
    index = memory["seen"].get(key, 0)
    memory["seen"][key] = index + 1
    return items[index] if index < len(items) else None


def stay(memory, key, items):
    """Return the next of the items; the last one stays."""
    index = memory["seen"].get(key, 0)
    memory["seen"][key] = index + 1
    return items[min(index, len(items) - 1)]


def create(scenario, memory):
    refused = turn(memory, "create", scenario.get("create", []))
    if refused:
        return refused["rc"], "", refused["err"]
    if memory["here"]:
        return 1, "", "ERROR: (gcloud.create) ALREADY_EXISTS: it is there\n"
    memory.update(here=True, life=memory["life"] + 1, started=False, ready=False)
    return 0, "", "Created.\n"


def life_of(scenario, memory):
    return scenario["lives"][memory["life"]]


def describe(scenario, memory, group):
    states, key = life_of(scenario, memory)["states"], f"states{memory['life']}"
    if group == "queued-resources":
        word = stay(memory, key, states)
        memory["node"] = word
        why = word.partition(":")[2]
        is_node = word in NODE_STATES
        return 0, "ACTIVE\t\n" if is_node else f"{word.partition(':')[0]}\t{why}\n", ""
    queued = "node" in memory
    if memory.get("node") == "GONE":
        return 1, "", "ERROR: (gcloud.describe) NOT_FOUND: no such node\n"
    return 0, (memory["node"] if queued else stay(memory, key, states)) + "\n", ""


def over_ssh(scenario, memory, verb, rest):
    life, hosts = life_of(scenario, memory), scenario["hosts"]
    command = next((w for w in rest if w.startswith("--command=")), "").partition("=")[
        2
    ]
    if verb == "scp":
        name, words = "scp", []
    elif "setup.sh" in command:
        name, words = "setup", []
    elif command.startswith("tail"):
        return 0, "the end of the log\n", ""
    else:
        inner = command.partition("worker.py ")[2].partition("; else")[0]
        name, *words = inner.split(" ")  # no test has a space in an argument
    planned = turn(memory, f"{name}{memory['life']}", life.get("ssh", {}).get(name, []))
    planned = planned or {}
    if planned.get("rc"):
        return planned["rc"], "", planned["err"]
    if name == "setup":
        memory["ready"] = True
    if name in ("scp", "setup"):
        return 0, "", ""
    if name == "start":
        memory.update(started=True, arguments=words[1:])
    answers: dict = {str(i): answer(life, memory, name, i, hosts) for i in range(hosts)}
    for index, changes in planned.get("answers", {}).items():
        answers[index] = None if changes is None else answers[index] | changes
    lines = [json.dumps(a) for a in answers.values() if a is not None]
    status = planned.get("rc", 255 if None in answers.values() else 0)
    error = "ERROR: (gcloud.ssh) [/usr/bin/ssh] exited with return code [255].\n"
    return status, "".join(f"\n{line}\n" for line in lines), error if status else ""


def answer(life, memory, name, index, hosts):
    if name == "unlock":
        return dict(worker=index, held_by=[], removed=False)
    if name == "check":
        devices = dict(devices=4 * hosts, local_devices=4)
        versions = {"jax": "0.10.2", "gpt2_jax": "0.1.0"}
        rest = dict(versions=versions, disk_free_bytes=5e10, time=1e9)
        return dict(worker=index) | devices | rest
    if name in ("start", "stop"):
        return dict(worker=index, state={"start": "running", "stop": "stopped"}[name])
    if not memory["ready"]:
        return dict(state="bare")
    return dict(worker=index) | run_state(life, memory, index)


def run_state(life, memory, index):
    base = dict(done=False, step=None, stopped=False, log=["the last line"])
    base["arguments"] = memory.get("arguments", life.get("arguments", []))
    if not memory["started"]:
        return base | dict(state="absent")
    run, place = life["run"], f"run-of-{memory['life']}"
    if index == 0:
        memory["now"] = stay(memory, place, run)
    word = memory["now"]
    word = word if isinstance(word, str) else word[index]
    kind, _, number = word.replace("@", ":").partition(":")
    if kind == "running":
        return base | dict(state="running", step=int(number) if number else None)
    if kind == "done":
        return base | dict(state="exited", exit=0, done=True, step=100)
    if kind == "exit":
        return base | dict(state="exited", exit=int(number))
    if kind == "stopped":
        return base | dict(state="exited", exit=0, stopped=True)
    return base | dict(state="absent")


if __name__ == "__main__":
    main(sys.argv[1:])
