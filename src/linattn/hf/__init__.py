"""linattn's models as Hugging Face models: importing this registers them with transformers' Auto classes.

    import linattn.hf
    model = AutoModelForCausalLM.from_pretrained("runs/my-export")

Kept out of ``import linattn``, because transformers takes seconds to import and is an extra: linattn[hf].
"""

try:
    import transformers
except ImportError as error:
    raise ImportError("linattn.hf needs transformers: pip install 'linattn[hf]'") from error

from linattn.hf.cache import LinattnCache
from linattn.hf.configuration import LinattnConfig
from linattn.hf.modeling import LinattnForCausalLM

transformers.AutoConfig.register(LinattnConfig.model_type, LinattnConfig)
transformers.AutoModelForCausalLM.register(LinattnConfig, LinattnForCausalLM)

__all__ = ["LinattnCache", "LinattnConfig", "LinattnForCausalLM"]
