"""What people get wrong: F7, F10, F11, F13, F14."""

from tests.faults.bench import Bench, Outcome, called, fault


@fault("F7", "a run that does not exist is named")
def skeleton(bench: Bench) -> Outcome:
    code, said = called("run", "nowhere.py", "--workdir", str(bench.new("f7")))
    return Outcome(1, int(code == 2 and "nowhere" in said))
