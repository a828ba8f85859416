"""The paper in miniature: V-MoE against dense ViTs at reading characters in typefaces that they have never seen."""
