"""One of two processes that differs in one field after another."""

from gpt2_jax import hosts
from gpt2_jax.config import ConfigError, load_config
from gpt2_jax.train import _texts

hosts.join()
fields = _texts(load_config("quickstart")) | hosts.fingerprint()
for name in fields:
    mine = fields if hosts.is_first() else fields | {name: fields[name] + "."}
    try:
        hosts.check_same(mine)
        print(f"accepted {name}")
    except ConfigError as error:
        assert str(error).startswith(f"{name} on process 1 ("), error
        print(f"refused {name}")
hosts.check_same(fields)
