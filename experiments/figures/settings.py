"""What is measured, and on how many examples."""

from experiments.configs import Figures as Figures
from experiments.configs import What as What
