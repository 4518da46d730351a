"Random sequences of what people do to a Learner, against a simple model of what may move"

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import fastai.callback.schedule
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastai.torch_core import params
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, RuleBasedStateMachine
from learners import bits, make_learner, OPTIMIZERS, same

from bnfreeze_fastai.freeze.callback import BatchNormFreeze
from bnfreeze_fastai.layers import MODES, stats_buffers

N_GROUPS = 3
modes, points = st.sampled_from(list(MODES)), st.integers(0, N_GROUPS - 1)


def three_groups(m):
    return [params(m[0][:2]), params(m[0][2:]), params(m[1])]


class Interrupts(Callback):
    order = 1000

    def __init__(self, event):
        setattr(self, event, self.stop)

    def stop(self):
        if self.training and self.train_iter == 1:
            raise KeyboardInterrupt


class LearnerLife(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.dir = TemporaryDirectory()
        self.n, self.policy, self.saved = 0, None, False

    @initialize(opt=st.sampled_from(list(OPTIMIZERS)), train_bn=st.booleans())
    def start(self, opt, train_bn):
        self.learn = make_learner(splitter=three_groups, opt_func=OPTIMIZERS[opt], train_bn=train_bn, lr=1e-3, path=Path(self.dir.name))
        self.learn.fit(1)

    def layers(self):
        return list(zip([self.learn.model[0][1], self.learn.model[0][4], self.learn.model[1][2]], range(N_GROUPS)))

    def expected(self, group):
        return self.policy[group >= self.n]

    @rule(n=points, bn=modes, bn_above=modes)
    def freeze_to_bn(self, n, bn, bn_above):
        self.learn.freeze_to_bn(n, bn=bn, bn_above=bn_above)
        self.n, self.policy = n, (bn, bn_above)

    @rule(n=points)
    def freeze_to(self, n):
        self.learn.freeze_to(n)
        self.n = n

    @rule()
    def create_opt(self):
        self.learn.create_opt()

    @rule()
    def save(self):
        self.learn.save('kept')
        self.saved = True

    @precondition(lambda self: self.saved)
    @rule(with_opt=st.booleans())
    def load(self, with_opt):
        self.learn.load('kept', with_opt=with_opt)

    @rule()
    def export_and_load(self):
        self.learn.export('e.pkl')
        loaded = load_learner(self.learn.path / 'e.pkl')
        loaded.dls, loaded.path = self.learn.dls, self.learn.path
        self.learn = loaded

    @precondition(lambda self: self.policy is not None)
    @rule()
    def remove(self):
        self.learn.remove_cb(BatchNormFreeze)
        self.policy = None

    @precondition(lambda self: self.policy is None)
    @rule(bn=modes, bn_above=modes)
    def add(self, bn, bn_above):
        self.learn.add_cb(BatchNormFreeze(bn, bn_above))
        self.policy = bn, bn_above

    @rule(reset_opt=st.booleans(), n_epoch=st.integers(1, 2))
    def fit(self, reset_opt, n_epoch):
        self.check(lambda: self.learn.fit(n_epoch, reset_opt=reset_opt), all_move=True)

    @rule(event=st.sampled_from(['before_batch', 'after_pred', 'before_step', 'after_step', 'after_batch']))
    def interrupt(self, event):
        def act():
            with suppress(KeyboardInterrupt):
                self.learn.fit(1, cbs=Interrupts(event))

        self.check(act, all_move=False)

    @rule()
    def validate(self):
        self.check(self.learn.validate, all_move=False)

    def check(self, act, all_move):
        convs = list(zip([self.learn.model[0][0], self.learn.model[0][3], self.learn.model[1][3]], range(N_GROUPS)))
        before = (
            [(bits(c.parameters()), g) for c, g in convs],
            [(bits(stats_buffers(l).values()), bits(l.parameters()), g) for l, g in self.layers()],
        )
        act()
        if self.policy is None:
            return
        for (c, group), (old, _) in zip(convs, before[0]):
            if group < self.n:
                assert same(old, c.parameters())
            elif all_move:
                assert not same(old, c.parameters())
        for (l, group), (stats, affine, _) in zip(self.layers(), before[1]):
            for old, new, moves in zip((stats, affine), (stats_buffers(l).values(), l.parameters()), MODES[self.expected(group)]):
                if not moves:
                    assert same(old, new), (group, self.expected(group))
                elif all_move:
                    assert not same(old, new), (group, self.expected(group))

    @invariant()
    def policy_shows_as_said(self):
        if self.policy is None or not hasattr(self, 'learn'):
            return
        assert self.learn.bn_summary().df['mode'].tolist() == [self.expected(g) for g in range(N_GROUPS)]

    def teardown(self):
        self.dir.cleanup()


TestLearnerLife = LearnerLife.TestCase
TestLearnerLife.settings = settings(
    max_examples=60, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestLearnerLife.pytestmark = [__import__('pytest').mark.filterwarnings('ignore')]
