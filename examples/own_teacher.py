"""A teacher of your own: Hugging Face's VideoMAE, its features read at the last layer.

pip install 'gdviz[hub]'
gdviz run --teachers.tasks order examples.own_teacher:videomae --teachers.strides 2 1

This one is small and untrained, so that nothing is downloaded. A trained one is
``VideoMAEModel.from_pretrained("MCG-NJU/videomae-base")``, read at "encoder.layer.11" in
``OwnView(size=224, length=16, frames_first=True)``.
"""

from transformers import VideoMAEConfig, VideoMAEModel

from gdviz.teachers.own import OwnView, Tapped


def videomae():
    """Return the teacher; a head for your classes is fitted on its features."""
    config = VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    view = OwnView(size=32, length=4, frames_first=True)
    return Tapped(VideoMAEModel(config), features="encoder.layer.1", view=view)
