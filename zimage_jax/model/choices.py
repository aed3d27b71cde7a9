"""Names that users choose among, and bounds of LoRAs. Apart from what they name, which takes longer
to import than a command's checks of its options."""

SAMPLERS = "euler", "dpmpp_2m", "res_multistep", "heun", "euler_ancestral"
SCHEDULES = "simple", "sgm_uniform", "beta", "linear_quadratic"
STRENGTH_RULES = "noise", "diffusers", "comfyui"
FITS = "crop", "pad", "stretch"
MOST_LORAS = 16  # of one job
LARGEST_LORA_WEIGHT = 100
