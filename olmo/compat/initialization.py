"""OLMo's module path for `olmo.model.init`."""

from olmo.model.init import init_normal as init_normal
