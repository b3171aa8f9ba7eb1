"""OLMo's module path for what lives in `olmo.optim.optimizers` and `olmo.optim.schedule`."""

from olmo.optim.clipping import Optimizer as Optimizer
from olmo.optim.optimizers import AdamW as AdamW
from olmo.optim.optimizers import LionW as LionW
from olmo.optim.optimizers import Muon as Muon
from olmo.optim.optimizers import build_optimizer as build_optimizer
from olmo.optim.optimizers import get_param_groups as get_param_groups
from olmo.optim.schedule import BoltOnWarmupScheduler as BoltOnWarmupScheduler
from olmo.optim.schedule import ConstantScheduler as ConstantScheduler
from olmo.optim.schedule import ConstantWithWarmupScheduler as ConstantWithWarmupScheduler
from olmo.optim.schedule import CosLinearEnvelope as CosLinearEnvelope
from olmo.optim.schedule import CosWithWarmup as CosWithWarmup
from olmo.optim.schedule import InvSqrtWithWarmup as InvSqrtWithWarmup
from olmo.optim.schedule import LinearWithWarmup as LinearWithWarmup
from olmo.optim.schedule import MaxScheduler as MaxScheduler
from olmo.optim.schedule import Scheduler as Scheduler
from olmo.optim.schedule import WarmupStableDecay as WarmupStableDecay
from olmo.optim.schedule import build_scheduler as build_scheduler
