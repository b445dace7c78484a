"""Whole systems out of papers, built of the framework's parts. Nothing in the framework imports them.

layers      TemporalConv            temporal_conv.py        SNAIL's dilated convolutions, Mishra et al. 2018
            TuringMachine           turing_machine.py       the Neural Turing Machine's memory, Graves et al. 2014
mixtures    EM, MeanField, ..       mixture/                EM and variational inference, Bishop 2006, chapters 9 and 10
            pruned                  pruning.py              takes unused components out of a trained model
training    Players, alternate      adversarial.py          hinge losses of two players, SAGAN, Zhang et al. 2019
inspection  analogy                 analogies.py            3CosAdd on word vectors, Mikolov, Yih & Zweig 2013
            edit_fact, localise     fact_editing.py         ROME, Meng et al. 2022
            SparseAutoencoder       sparse_autoencoder.py   Towards Monosemanticity, Bricken et al. 2023
"""

from multimodal.zoo.pruning import pruned
from multimodal.zoo.temporal_conv import TemporalConv
from multimodal.zoo.turing_machine import TuringMachine

__all__ = ["TemporalConv", "TuringMachine", "pruned"]
