"""lm-eval's own command with linattn's models and tasks known to it.

python -m linattn.tasks run --model linattn --model_args pretrained=runs/debug-cpu --tasks linattn_attributes --limit 8
"""

from linattn.tasks.lm_eval import main

main()
