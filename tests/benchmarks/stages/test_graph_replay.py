"""Replays on the CPU: what a graph's replay gets wrong is told apart."""

import pytest
import torch

pytest.importorskip("triton")

from stages import graph_replay


def stale(step):
    """A replay that keeps what it was captured with."""
    return (lambda: None), step()


def test_replays_that_follow_their_inputs_are_right():
    found = graph_replay.run_graphs(graph_replay.rehearsed_capture, "cpu")
    assert found["summary"] == "5 of 5 losses replay bit for bit"
    assert found["ok"]


def test_a_replay_that_keeps_old_penalties_is_wrong():
    def baked(problem):
        if not hasattr(problem.y, "penalties"):  # a static batch keeps those that it was first called with
            problem.y.penalties = {"pk": problem.pk.item(), "pm": problem.pm.item()}
        loss_of, _ = graph_replay.cases()["streamed rows"]
        return loss_of(graph_replay.replace(problem, **problem.y.penalties))

    shape = graph_replay.SHAPES["streamed rows"]
    assert graph_replay.replays_wrong(baked, shape, graph_replay.rehearsed_capture, "cpu").startswith(
        "replay 1: loss off by"
    )
    loss_of, _ = graph_replay.cases()["linear"]
    assert (
        graph_replay.replays_wrong(
            loss_of, graph_replay.LINEAR_SHAPE, graph_replay.rehearsed_capture, "cpu"
        )
        == ""
    )
    assert graph_replay.replays_wrong(loss_of, graph_replay.LINEAR_SHAPE, stale, "cpu") != ""


def test_a_capture_that_fails_is_the_result():
    def fails(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    found = graph_replay.run_graphs(fails, "cpu")
    assert not found["ok"]
    assert found["cases"]["linear"] == "RuntimeError: operation not permitted when stream is capturing"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_losses_replay_in_a_cuda_graph():
    found = graph_replay.run_graphs()
    assert found["ok"], found["summary"]
