"""OLMo's module path for what lives in `olmo.train.optim` and `olmo.train.schedule`."""

from olmo.train.clip import Optimizer as Optimizer
from olmo.train.optim import AdamW as AdamW
from olmo.train.optim import LionW as LionW
from olmo.train.optim import Muon as Muon
from olmo.train.optim import build_optimizer as build_optimizer
from olmo.train.optim import get_param_groups as get_param_groups
from olmo.train.schedule import BoltOnWarmupScheduler as BoltOnWarmupScheduler
from olmo.train.schedule import ConstantScheduler as ConstantScheduler
from olmo.train.schedule import ConstantWithWarmupScheduler as ConstantWithWarmupScheduler
from olmo.train.schedule import CosLinearEnvelope as CosLinearEnvelope
from olmo.train.schedule import CosWithWarmup as CosWithWarmup
from olmo.train.schedule import InvSqrtWithWarmup as InvSqrtWithWarmup
from olmo.train.schedule import LinearWithWarmup as LinearWithWarmup
from olmo.train.schedule import MaxScheduler as MaxScheduler
from olmo.train.schedule import Scheduler as Scheduler
from olmo.train.schedule import WarmupStableDecay as WarmupStableDecay
from olmo.train.schedule import build_scheduler as build_scheduler
