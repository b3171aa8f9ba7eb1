"""OLMo's import paths for what lives elsewhere here, or what our trainer does not use.

`compat` is on `olmo.__path__`, `compat/data` on `olmo.data.__path__`, `compat/checkpoint` on
`olmo.checkpoint.__path__`. Nothing of ours imports them.
"""
