"""vLLM's classes of models: which it adapts, and of which it adapts embeddings and output layers.

From vllm/model_executor/models: `registry.py`, and `SupportsLoRA` and `embedding_modules` of each class. Drafts for
speculative decoding are left out.
"""

__all__ = ["ADAPTED", "BOTH", "EMBEDDINGS", "NOT_ADAPTED"]

# LoRA on neither embed_tokens nor lm_head
_NEITHER = frozenset(
    """
    AXK1ForCausalLM AfmoeForCausalLM AudioFlamingo3ForConditionalGeneration BagelForConditionalGeneration
    BailingMoeForCausalLM BailingMoeV2ForCausalLM BertModel BertSpladeSparseEmbeddingModel BgeM3EmbeddingModel
    Blip2ForConditionalGeneration ChatGLMForConditionalGeneration ChatGLMModel ClefOmniForJointSchema
    CohereCompassForConditionalGeneration ColPaliForRetrieval ColQwen3 ColQwen3_5
    Cosmos3ForConditionalGeneration DeepseekForCausalLM DeepseekOCR2ForCausalLM DeepseekOCRForCausalLM
    DeepseekV2ForCausalLM DeepseekV3BidirectionalModel DeepseekV3ForCausalLM DotsOCRForCausalLM
    Ernie4_5_MoeForCausalLM Ernie4_5_VLMoeForConditionalGeneration Exaone4_5_ForConditionalGeneration
    GLM4VForCausalLM Gemma2ForCausalLM Gemma2Model Gemma3ForCausalLM Gemma3ForConditionalGeneration
    Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration GemmaForCausalLM
    Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration
    Glm4vMoeForConditionalGeneration GlmAsrForConditionalGeneration GlmOcrForConditionalGeneration
    GptOssForCausalLM Granite4VisionForConditionalGeneration GraniteSpeechForConditionalGeneration
    GraniteSpeechPlusForConditionalGeneration H2OVLChatModel HF_ColBERT HYV3ForCausalLM
    Idefics3ForConditionalGeneration InternLM2ForCausalLM InternLM2ForRewardModel
    InternS1ForConditionalGeneration InternS1ProForConditionalGeneration InternS2MobiusForConditionalGeneration
    InternS2PreviewForConditionalGeneration InternVLChatModel InternVLForConditionalGeneration
    IsaacForConditionalGeneration JinaVLForRanking KeyeForConditionalGeneration
    KeyeVL1_5ForConditionalGeneration LagunaForCausalLM Lfm2VlForConditionalGeneration
    LightOnOCRForConditionalGeneration Llama4ForConditionalGeneration LlamaNemotronVLForSequenceClassification
    LlamaNemotronVLModel Llama_Nemotron_Nano_VL LlavaForConditionalGeneration LlavaNextForConditionalGeneration
    LlavaNextVideoForConditionalGeneration LongcatFlashForCausalLM LongcatFlashNgramForCausalLM MiMoForCausalLM
    MiniCPMO MiniCPMV MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration
    MiniMaxM2ForCausalLM Ministral3ForCausalLM Mistral3ForConditionalGeneration MistralForCausalLM
    MistralLarge3ForCausalLM ModernBertModel Molmo2ForConditionalGeneration MolmoForCausalLM
    MuseGlimmerForCausalLM MuseGlimmerForConditionalGeneration NVLM_D OPTForCausalLM OlmoHybridForCausalLM
    OlmoeForCausalLM OpenCUAForConditionalGeneration OpenPanguVLForConditionalGeneration OpsColQwen3Model
    PaliGemmaForConditionalGeneration PanguEmbeddedForCausalLM PanguProMoEV2ForCausalLM PanguUltraMoEForCausalLM
    Phi4MMForCausalLM PixtralForConditionalGeneration Plamo3ForCausalLM QianfanOCRForConditionalGeneration
    Qwen2ForCausalLM Qwen2ForProcessRewardModel Qwen2ForRewardModel Qwen2Model Qwen2MoeForCausalLM
    Qwen2VLForConditionalGeneration Qwen2_5OmniForConditionalGeneration Qwen2_5OmniModel
    Qwen2_5_VLForConditionalGeneration Qwen3ASRForConditionalGeneration
    Qwen3ASRForcedAlignerForTokenClassification Qwen3ASRRealtimeGeneration Qwen3NextForCausalLM
    Qwen3OmniMoeForConditionalGeneration Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
    Qwen3VLNemotronEmbedModel Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration Rnj1ForCausalLM
    RobertaForMaskedLM RobertaForSequenceClassification RobertaModel SarvamMLAForCausalLM SarvamMoEForCausalLM
    SmolVLMForConditionalGeneration UltravoxModel UnlimitedOCRForCausalLM VoxtralForConditionalGeneration
    VoxtralRealtimeGeneration VoyageQwen3BidirectionalEmbedModel WhisperForConditionalGeneration
    XLMRobertaForSequenceClassification XLMRobertaModel
    """.split()
)
# LoRA on embed_tokens and lm_head
BOTH = frozenset(
    """
    ApertusForCausalLM DeciLMForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM ExaoneMoEForCausalLM
    ExaoneMoeForCausalLM FalconH1ForCausalLM GraniteForCausalLM GraniteMoeForCausalLM
    GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM GraniteSWAForCausalLM
    HyperCLOVAXForCausalLM IQuestCoderForCausalLM InternLM3ForCausalLM JambaForCausalLM
    JambaForSequenceClassification JinaEmbeddingsV5Model K2HorizonForCausalLM LLaMAForCausalLM Lfm2ForCausalLM
    Lfm2MoeForCausalLM Llama4ForCausalLM LlamaForCausalLM LlamaModel MiniCPM3ForCausalLM MiniCPMForCausalLM
    MistralModel MixtralForCausalLM MossAudioModel NemotronForCausalLM NemotronHForCausalLM
    NemotronHPuzzleForCausalLM NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2 NemotronH_Omni_Reasoning_V3
    NemotronH_Super_Omni_Reasoning_V3 Param2MoEForCausalLM Phi3ForCausalLM PhiMoEForCausalLM Qwen3ForCausalLM
    Qwen3MoeForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM SolarForCausalLM TeleChat2ForCausalLM
    TeleChat3ForCausalLM TeleFLMForCausalLM
    """.split()
)
# LoRA on embed_tokens
EMBEDDINGS = frozenset(
    """
    ArceeForCausalLM Cohere2ForCausalLM CohereForCausalLM CwmForCausalLM Emu3ForConditionalGeneration
    FlexOlmoForCausalLM GPTBigCodeForCausalLM GPTNeoXForCausalLM GlmForCausalLM HunYuanDenseV1ForCausalLM
    HunYuanMoEV1ForCausalLM HunYuanVLForConditionalGeneration Jais2ForCausalLM MellumForCausalLM
    NanbeigeForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM PhiForCausalLM SeedOssForCausalLM
    SmolLM3ForCausalLM Starcoder2ForCausalLM VaultGemmaForCausalLM VibeVoiceAsrForConditionalGeneration
    """.split()
)
ADAPTED = _NEITHER | BOTH | EMBEDDINGS | {"ExaoneForCausalLM"}  # the last one: wte and lm_head
# which it runs, and does not adapt
NOT_ADAPTED = frozenset(
    """
    AriaForConditionalGeneration BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM
    BailingMoeV3VLForConditionalGeneration BeeForConditionalGeneration BertForMaskedLM
    BertForSequenceClassification BertForTokenClassification BloomForCausalLM CLIPModel Cohere2MoeForCausalLM
    Cohere2VisionForConditionalGeneration CohereAsrForConditionalGeneration ColBERTJinaRobertaModel
    ColBERTLfm2Model ColBERTModernBertModel ColModernVBertForRetrieval Cosmos3EdgeForConditionalGeneration
    DbrxForCausalLM DeepseekVLV2ForCausalLM DiffusionGemmaForBlockDiffusion EmbeddingGemma2Model
    ExtractHiddenStatesModel FalconForCausalLM FalconMambaForCausalLM FireRedASR2ForConditionalGeneration
    FunASRForConditionalGeneration FunAudioChatForConditionalGeneration GPT2ForSequenceClassification
    GPT2LMHeadModel GPTJForCausalLM Gemma3TextModel Gemma3nForCausalLM Gemma3nForConditionalGeneration GteModel
    GteNewForSequenceClassification GteNewModel HCXVisionV2ForCausalLM HfMoondream HrmTextForCausalLM
    IQuestLoopCoderForCausalLM JinaForRanking KananaVForConditionalGeneration KimiK25ForConditionalGeneration
    KimiVLForConditionalGeneration LlamaBidirectionalForSequenceClassification LlamaBidirectionalModel
    LlavaOnevision2ForConditionalGeneration LlavaOnevisionForConditionalGeneration MLPSpeculatorPreTrainedModel
    Mamba2ForCausalLM MambaForCausalLM MedusaModel MiDashengLMModel MiMoV2FlashForCausalLM MiMoV2ForCausalLM
    MiMoV2OmniForCausalLM ModernBertForSequenceClassification ModernBertForTokenClassification
    Moondream3ForCausalLM MoonshotKimiaForCausalLM MossTranscribeDiarizeForConditionalGeneration
    NemotronParseForConditionalGeneration NomicBertModel OpenAIPrivacyFilterForTokenClassification
    OpenVLAForActionPrediction OrionForCausalLM Ovis Ovis2_5 Ovis2_6ForCausalLM Ovis2_6_MoeForCausalLM
    PaddleOCRVLForConditionalGeneration Phi3VForCausalLM Phi4ForCausalLMV Qwen2AudioForConditionalGeneration
    RForConditionalGeneration RobertaForTokenClassification SiglipModel SkyworkR1VChatModel StableLmForCausalLM
    Step1ForCausalLM Step3TextForCausalLM Step3VLForConditionalGeneration Step3p5ForCausalLM
    Step3p7ForConditionalGeneration StepVLForConditionalGeneration Terratorch XLMRobertaForTokenClassification
    Zamba2ForCausalLM
    """.split()
)
