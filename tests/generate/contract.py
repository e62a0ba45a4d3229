"""What every generator promises: the suite that each adapter runs, the scripted fake included."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from models import helpers as h

from whet.data import Sample, Weights
from whet.generate import Request
from whet.methods.options import Sampling

END = (1, 5)
PROMPTS = [h.prompt(i, ids) for i, ids in enumerate([(2,), (3, 4, 6, 7, 8, 9), (10, 11), (12, 13, 14)])]


def requests(count: int = 3, sampling: Sampling = Sampling(5), seed: int = 7) -> list[Request]:
    return [
        Request(prompt, draw, answer, sampling, seed) for draw, prompt in enumerate(PROMPTS) for answer in range(count)
    ]


def plain(samples: Sequence[Sample]) -> list[tuple]:
    return [(s.draw, s.answer, s.ids, s.finish, s.text) for s in samples]


class Contract:
    """A test module takes it as the base of its own class, and gives the fixture `generator`."""

    def test_one_sample_per_request_in_their_order(self, generator: Any) -> None:
        asked = requests()
        asked = asked[::-2] + asked[::2]
        got = list(generator.generate(asked))
        assert [(s.draw, s.answer) for s in got] == [(r.draw, r.answer) for r in asked]

    def test_the_end_token_belongs_to_the_answer_and_nothing_follows_it(self, generator: Any) -> None:
        got = list(generator.generate(requests(8)))
        assert {sample.finish for sample in got} == {"stop", "length"}
        for sample in got:
            assert not set(sample.ids[:-1]) & set(END)
            assert (sample.ids[-1] in END) == (sample.finish == "stop")
            assert sample.truncated == (sample.finish == "length")
            assert 1 <= len(sample.ids) <= 5
            assert sample.finish == "stop" or len(sample.ids) == 5

    def test_an_end_token_on_the_last_allowed_place_is_a_stop(self, generator: Any) -> None:
        whole = [s for s in generator.generate(requests(8, Sampling(12))) if s.finish == "stop" and len(s.ids) > 1]
        assert whole
        for sample in whole[:3]:
            ask = Request(PROMPTS[sample.draw], sample.draw, sample.answer, Sampling(len(sample.ids)), 7)
            short = replace(ask, sampling=Sampling(len(sample.ids) - 1))
            exact, cut = generator.generate([ask, short])
            assert (exact.ids, exact.finish) == (sample.ids, "stop")
            assert (cut.ids, cut.finish) == (sample.ids[:-1], "length")

    def test_each_id_has_a_log_prob_and_the_text_is_of_the_ids(self, generator: Any) -> None:
        for sample in generator.generate(requests()):
            assert len(sample.sampler_logp) == len(sample.ids)
            assert max(sample.sampler_logp) <= 0
            assert sample.text == " ".join(map(str, sample.ids))
            assert all(type(token) is int for token in sample.ids)

    def test_the_same_requests_give_the_same_samples(self, generator: Any) -> None:
        assert list(generator.generate(requests())) == list(generator.generate(requests()))

    def test_an_answer_is_the_same_alone_in_another_batch_and_in_another_order(self, generator: Any) -> None:
        asked = requests()
        whole = plain(list(generator.generate(asked)))
        assert [plain(list(generator.generate([one])))[0] for one in asked] == whole
        assert plain(list(generator.generate(asked[::-1])))[::-1] == whole
        assert plain(list(generator.generate(asked[5:]))) == whole[5:]  # as after a resume: by draw, not by count

    def test_an_answer_does_not_depend_on_the_seed_of_its_neighbors(self, generator: Any) -> None:
        one, other = requests(2, Sampling(8), seed=1), requests(2, Sampling(8), seed=2)
        mixed = [request for both in zip(one, other, strict=True) for request in both]
        got = plain(list(generator.generate(mixed)))
        assert got[::2] == plain(list(generator.generate(one)))
        assert got[1::2] == plain(list(generator.generate(other)))

    def test_requests_with_other_dials_do_not_change_each_other(self, generator: Any) -> None:
        one, other = requests(2, Sampling(8)), requests(2, Sampling(3, 0.5, top_k=4))
        mixed = [request for both in zip(one, other, strict=True) for request in both]
        got = plain(list(generator.generate(mixed)))
        assert got[::2] == plain(list(generator.generate(one)))
        assert got[1::2] == plain(list(generator.generate(other)))

    def test_it_says_the_version_it_adopted(self, generator: Any) -> None:
        assert generator.version == 0
        generator.load_weights(Weights(3, getattr(generator, "role", None)))
        assert generator.version == 3
        assert {sample.version for sample in generator.generate(requests())} == {3}

    def test_a_score_is_one_log_prob_for_every_id_after_the_first(self, generator: Any) -> None:
        ids = [torch.tensor([2, 3, 4, 5, 6]), torch.tensor([7, 8]), torch.tensor([3, 1, 9])]
        got = generator.logprobs(ids)
        assert [tuple(one.shape) for one in got] == [(4,), (1,), (2,)]
        assert all(float(one.max()) <= 0 for one in got)

    def test_no_requests_give_no_samples(self, generator: Any) -> None:
        assert list(generator.generate([])) == []
