"""Constructors of tasks and of distributions of tasks."""

from metaopt.tasks.autoencoding import autoencoder as autoencoder
from metaopt.tasks.classification import classification as classification
from metaopt.tasks.families import mlp_family as mlp_family
from metaopt.tasks.few_class import few_class as few_class
from metaopt.tasks.finetuning import cached as cached
from metaopt.tasks.finetuning import finetune as finetune
from metaopt.tasks.language import language_model as language_model
from metaopt.tasks.partial import LoRA as LoRA
from metaopt.tasks.quadratics import quadratic as quadratic
from metaopt.tasks.reparametrising import reparametrised as reparametrised
