"""When too much waits, pictures go first and commands last, and everything is counted."""

from __future__ import annotations

import numpy as np

from runtime.cameras.base import Frame
from runtime.events import Decision, Note, Published
from runtime.recorder.event_queue import EventQueue, Lost
from tests.recordings import decision, published

PIXELS = np.zeros((2, 2, 3), np.uint8)


def decided(number: int) -> Decision:
    return decision(number, Frame(PIXELS, float(number)), [[0.0, 0.0]])


def test_all_come_out_in_the_order_in_which_they_came() -> None:
    queue = EventQueue()
    events = [decided(0), published(0.1, 0, 0), Note(0.2, "camera", "lost"), published(0.3, 0, 0), decided(1)]
    for event in events:
        queue.put(event)
    assert len(queue) == 5
    waiting, lost = queue.take_all()
    assert [item.event for item in waiting] == events
    assert not lost
    assert queue.take_all() == ([], Lost())


def test_pictures_go_first() -> None:
    queue = EventQueue(pictures=2, decisions=10)
    for number in range(5):
        queue.put(decided(number))
    waiting, lost = queue.take_all()
    assert [item.pictured for item in waiting] == [True, True, False, False, False]
    assert lost == Lost(pictures=3)
    queue.put(decided(5))
    assert queue.take_all()[0][0].pictured  # there is room again


def test_then_the_oldest_decisions_and_notes_and_commands_have_room_of_their_own() -> None:
    queue = EventQueue(pictures=2, decisions=3, commands=100, notes=2)
    for number in range(50):
        queue.put(decided(number))
        queue.put(published(float(number), 0, 0))
        queue.put(Note(float(number), "camera", "lost"))
    waiting, lost = queue.take_all()
    events = [item.event for item in waiting]
    assert [event.number for event in events if isinstance(event, Decision)] == [47, 48, 49]
    assert sum(isinstance(event, Published) for event in events) == 50
    assert lost.decisions == 47
    assert lost.commands == 0
    assert lost.notes == 48
    assert lost.pictures <= 50


def test_even_commands_are_bounded_and_the_newest_stay() -> None:
    queue = EventQueue(commands=3)
    for number in range(10):
        queue.put(published(float(number), 0, 0))
    waiting, lost = queue.take_all()
    assert [item.event.at_s for item in waiting] == [7, 8, 9]
    assert lost == Lost(commands=7)


def test_a_decision_that_goes_gives_its_picture_s_place_back() -> None:
    queue = EventQueue(pictures=1, decisions=1)
    for number in range(3):
        queue.put(decided(number))
    waiting, lost = queue.take_all()
    assert len(waiting) == 1
    assert lost.decisions == 2


def test_what_was_lost_adds_up_and_reads_well() -> None:
    total = Lost(pictures=2) + Lost(pictures=1, commands=4)
    assert total == Lost(pictures=3, commands=4)
    assert str(total) == "3 pictures, 4 commands"
    assert str(Lost()) == "nothing"
    assert not Lost()
