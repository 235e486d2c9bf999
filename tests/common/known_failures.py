"""The common tests that fail, each with its reason; `library.must_fail` checks that they do."""

REFUSED = "It loads an incomplete checkpoint, which from_pretrained refuses on purpose."
IMAGE_CUT_OFF = (
    "It brings all ids below the number of rows, which turns <image>, whose id lies past the tables, into another token while "
    "the images are still given."
)
NO_ROW = "It looks <image> up in the embedding table, which has no row for it."
NO_PLACES = "It gives images without input_ids, hence without their places; that is refused on purpose."
UNASKED_IMAGES = "Its random ids contain <image>, for which it gives no images."

MODELS = {
    "test_base_model_prefix_loads_base_weights": REFUSED,
    "test_can_init_all_missing_weights": REFUSED,
    "test_correct_missing_keys": REFUSED,
    "test_generation_tester_mixin_inheritance": "The source distribution lacks the mixin with the tests of generate.",
    "test_model_weights_reload_no_missing_tied_weights": REFUSED,
}
PHI3 = {
    "test_inputs_embeds": NO_ROW,
    "test_inputs_embeds_matches_input_ids": NO_ROW,
    "test_resize_embeddings_untied": IMAGE_CUT_OFF,
    "test_resize_tokens_embeddings": IMAGE_CUT_OFF,
}
QWEN2 = {
    "test_inputs_embeds": NO_PLACES,
    "test_inputs_embeds_matches_input_ids": NO_PLACES,
    "test_model_rope_scaling_from_config_0_linear": UNASKED_IMAGES,
    "test_model_rope_scaling_from_config_1_dynamic": UNASKED_IMAGES,
    "test_model_rope_scaling_from_config_2_yarn": UNASKED_IMAGES,
}
PROCESSORS = {}
M3 = {
    "test_subprocessor_defaults_0_text": "The tokenizer alone does not write the space with which a text begins.",
}
