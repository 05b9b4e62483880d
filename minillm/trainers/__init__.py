"""The trainers: pretrain, sft, reward, ppo, dpo. Each is a config and one train(); common.py is what they share."""
