"""The studio on ZeroGPU, by a stand-in for its package that forks and copies as that one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pxpo.ui.zerogpu import LENT, lent

ROOT = Path(__file__).resolve().parents[1]

SPACES = '''
import contextvars, functools, multiprocessing, traceback

forked = False
context = multiprocessing.get_context("fork")
asked = []  # durations
for_whom = []


class Failed(Exception):
    """All that comes through of an error is its kind's name."""


def serve(task, calls, results, stop):
    global forked
    forked = True
    while True:
        values = calls.get()
        stop.clear()
        try:
            work = task(*values)
            for value in work:
                if stop.is_set():
                    work.close()
                    break
                results.put(("value", value))
        except Exception as error:
            traceback.print_exc()
            results.put(("error", type(error).__name__))
        results.put(("end", None))


def GPU(duration):
    def decorate(task):
        workers = []  # a process that is done waits for the next call

        @functools.wraps(task)
        def call(*values):
            asked.append(duration)
            for_whom.append(visitor.get())
            if workers:
                worker = workers.pop()
            else:
                calls, results, stop = context.Queue(), context.Queue(), context.Event()
                process = context.Process(
                    target=serve, args=(task, calls, results, stop), daemon=True
                )
                process.start()
                worker = (calls, results, stop)
            calls, results, stop = worker
            calls.put(values)
            try:
                while True:
                    kind, value = results.get(timeout=60)
                    if kind == "error":
                        raise Failed(value)
                    if kind == "end":
                        return
                    yield value
            except GeneratorExit:
                stop.set()
                while results.get(timeout=60)[0] != "end":
                    pass
                raise
            finally:
                workers.append(worker)

        return call

    return decorate


visitor = contextvars.ContextVar("visitor", default=None)
'''

SCRIPT = """
import sys, pathlib
import spaces, torch
from conftest import random_pipeline
from test_studio import PAINT, BLUE, SMALL, paint, same
from pxpo import Segmenter, finish
from pxpo.errors import PxpoError
from pxpo.models import StableDiffusion
from pxpo.studio import Studio
from pxpo.ui import zerogpu

here, eye = pathlib.Path(sys.argv[1]), sys.argv[2]
assert zerogpu.LENT
torch.set_num_threads(1)

def studio(name, **options):
    model = StableDiffusion(random_pipeline(), "cpu", "toy")
    return Studio(model, Segmenter(eye), here / name, **options)

zero, plain = studio("zero", lend=zerogpu.lent), studio("plain")
"""


CHECKS = """
def learnt(studio):
    run = finish(studio.start(**SMALL))
    run = finish(studio.step(run.id, PAINT, paint()))
    run = finish(studio.step(run.id, BLUE))
    return run, studio.heat(run, PAINT)

def updates_are_the_same_as_anywhere():
    weights = {n: p.clone() for n, p in zero.model.network.state_dict().items()}
    (there, heat), (here, plain_heat) = learnt(zero), learnt(plain)
    assert there.count == 2 and same(there, here)
    assert there.settings == here.settings and there.reward == here.reward
    assert heat.tobytes() == plain_heat.tobytes()
    assert all(torch.equal(weights[n], p) for n, p in zero.model.network.state_dict().items())
    assert spaces.asked == [zerogpu.SECONDS] * 4  # a beginning, two steps, a heat-map

def errors_say_there_what_they_say_anywhere():
    def message(studio):
        run = finish(studio.start(**SMALL))
        try:
            finish(studio.step(run.id, PAINT))
        except PxpoError as error:
            assert studio.run(run.id).count == 0
            return type(error), str(error)

    assert message(zero) == message(plain) != None

def work_that_is_stopped_ends_there_and_the_next_goes_on():
    run, other = (finish(studio.start(**SMALL)) for studio in (zero, plain))
    work = zero.step(run.id, PAINT, paint())
    progress = [next(work) for _ in range(3)]
    assert all(one.latents is None for one in progress)
    work.close()
    assert zero.run(run.id) is run
    there, here = finish(zero.step(run.id, BLUE)), finish(plain.step(other.id, BLUE))
    assert same(there, here)

def a_gpu_is_asked_for_in_the_name_of_who_asks():
    spaces.for_whom.clear()
    spaces.visitor.set("Ada")
    run = zero.thread.call(finish, zero.start(**{**SMALL, "seed": 9}))
    for _ in zero.thread.wrap(zero.step)(run.id, BLUE):
        pass
    assert spaces.for_whom == ["Ada", "Ada"]

updates_are_the_same_as_anywhere()
errors_say_there_what_they_say_anywhere()
work_that_is_stopped_ends_there_and_the_next_goes_on()
a_gpu_is_asked_for_in_the_name_of_who_asks()
"""


@pytest.mark.slow
def test_a_studio_on_zerogpu(tmp_path, segmenter):
    """The functions of CHECKS, in one process, as it takes a while to start."""
    (tmp_path / "spaces.py").write_text(SPACES)
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests")))
    # One thread of OpenMP: its others do not live through a fork.
    settings = {"PYTHONPATH": path, "SPACES_ZERO_GPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + CHECKS, tmp_path, segmenter.name],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_elsewhere_work_stays_as_it_is():
    def work():
        yield

    assert not LENT and lent(work) is work
