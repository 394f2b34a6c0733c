//! Pairs of tokenizers and models that belong together, and that do not.

use super::*;

/// ChatGLM-6B's file, with the numbers of the original.
fn chatglm(appends_pieces: bool, num_image_tokens: Option<u32>) -> TokenizerFacts {
    TokenizerFacts {
        family: Family::ChatGlm,
        ids: 130_344,
        appends_pieces,
        num_image_tokens,
        has_roles: None,
        tokens: vec![
            ("mask_token_id", "[MASK]", 130_000),
            ("gmask_token_id", "[gMASK]", 130_001),
            ("bos_token_id", "<sop>", 130_004),
            ("pad_token_id", "<pad>", 3),
        ],
        ends: vec![("<eop>", 130_005)],
    }
}

fn config(vocab_size: usize, first: u32, pad: u32) -> ConfigIds {
    ConfigIds {
        families: vec![Family::ChatGlm],
        vocab_size,
        bos_token_id: Some(first + 4),
        eos_token_ids: vec![first + 5],
        mask_token_id: Some(first),
        gmask_token_id: Some(first + 1),
        pad_token_id: Some(pad),
    }
}

fn slim() -> ConfigIds {
    config(130_528, 130_000, 3)
}

fn old() -> ConfigIds {
    config(150_528, 150_000, 20_003)
}

#[test]
fn the_three_eras_are_recognised() {
    let cases = [
        (chatglm(true, None), old(), Era::A, 20_000),
        (chatglm(true, Some(20_000)), old(), Era::A, 20_000),
        (chatglm(false, None), old(), Era::B, 20_000),
        (chatglm(false, Some(0)), slim(), Era::C, 0),
    ];
    for (facts, config, era, num_image_tokens) in cases {
        let verdict = EraVerdict {
            num_image_tokens,
            generation: Generation::ChatGlm(era),
            warnings: vec![],
        };
        let rows = Some(config.vocab_size);
        assert_eq!(facts.check(&config, rows), Ok(verdict));
    }
}

#[test]
fn every_mixture_is_refused_with_its_own_message() {
    let with = |change: fn(&mut ConfigIds)| {
        let mut config = slim();
        change(&mut config);
        config
    };
    let new = || chatglm(false, Some(0));
    let cases = [
        (
            new(),
            slim(),
            Some(150_528),
            "embedding has 150528 rows, but config.json says vocab_size 130528",
        ),
        (
            chatglm(true, Some(20_000)),
            slim(),
            None,
            "ids up to 150343 (shifted by 20000 image tokens), but the model has only 130528",
        ),
        (new(), old(), None, "every text id would be 20000 too low"),
        (
            new(),
            config(200_000, 0, 0),
            None,
            "the model has 200000 ids, but the tokenizer only 130344",
        ),
        (
            chatglm(false, Some(u32::MAX)),
            slim(),
            None,
            "ids up to 4295097638",
        ),
        (
            new(),
            with(|c| c.mask_token_id = Some(150_000)),
            None,
            "mask_token_id 150000, but the tokenizer's [MASK] is 130000",
        ),
        (
            new(),
            with(|c| c.gmask_token_id = Some(150_001)),
            None,
            "gmask_token_id 150001, but the tokenizer's [gMASK] is 130001",
        ),
        (
            new(),
            with(|c| c.bos_token_id = Some(150_004)),
            None,
            "bos_token_id 150004, but the tokenizer's <sop> is 130004",
        ),
        (
            new(),
            with(|c| c.eos_token_ids = vec![150_005]),
            None,
            "eos_token_id 150005, but the tokenizer's <eop> is 130005",
        ),
    ];
    for (facts, config, rows, expected) in cases {
        let message = match facts.check(&config, rows) {
            Ok(verdict) => panic!("accepted: {verdict:?}"),
            Err(error) => error.to_string(),
        };
        assert!(
            message.contains(expected),
            "`{message}` says not `{expected}`"
        );
    }
}

#[test]
fn what_does_no_harm_is_a_warning() {
    let mut config = slim();
    config.pad_token_id = None;
    let verdict = chatglm(false, None).check(&config, None);
    let warnings = vec![
        EraWarning::ImageTokensAssumedZero {
            vocab_size: 130_528,
        },
        EraWarning::PadMissing {
            token: "<pad>",
            tokenizer: 3,
        },
    ];
    assert_eq!(verdict.map(|verdict| verdict.warnings), Ok(warnings));
    config.pad_token_id = Some(20_003);
    let verdict = chatglm(false, Some(0)).check(&config, None);
    let differs = EraWarning::PadDiffers {
        config: 20_003,
        token: "<pad>",
        tokenizer: 3,
    };
    assert_eq!(verdict.map(|verdict| verdict.warnings), Ok(vec![differs]));
}

/// The files of ChatGLM2 and 3, and of GLM-4, with the numbers of the originals.
fn chatglm2(has_roles: Option<bool>) -> TokenizerFacts {
    let find = |text: &str| ["<unk>", "<s>", "</s>"].iter().position(|&t| t == text);
    TokenizerFacts::of_chatglm2(64_789, |text| Some(find(text)? as u32), has_roles)
}

fn glm4() -> TokenizerFacts {
    TokenizerFacts::of_tokens(&Tokens {
        tokens: vec![vec![b'a']; 151_329],
        merges: vec![],
        whole_words: true,
        specials: vec![],
    })
}

fn later(families: &[Family], vocab_size: usize, eos: &[u32], pad: u32) -> ConfigIds {
    ConfigIds {
        families: families.to_vec(),
        vocab_size,
        eos_token_ids: eos.to_vec(),
        pad_token_id: Some(pad),
        ..ConfigIds::default()
    }
}

const GLM4_ENDS: [u32; 3] = [151_329, 151_336, 151_338];

#[test]
fn the_later_generations_are_recognised() {
    let two = |eos: &[u32]| later(&[Family::ChatGlm2], 65_024, eos, 0);
    let four = later(&[Family::Glm4], 151_552, &GLM4_ENDS, 151_329);
    let doubt = vec![EraWarning::TakenForChatGlm2];
    let (three, second) = (Generation::ChatGlm3, Generation::ChatGlm2);
    for (facts, config, generation, warnings) in [
        (chatglm2(Some(false)), two(&[2]), second, vec![]),
        (chatglm2(Some(true)), two(&[2]), three, vec![]),
        (chatglm2(None), two(&[2, 64_795, 64_797]), three, vec![]),
        (chatglm2(None), two(&[2]), second, doubt),
        (glm4(), four, Generation::Glm4, vec![]),
    ] {
        let verdict = EraVerdict {
            num_image_tokens: 0,
            generation,
            warnings,
        };
        let rows = Some(config.vocab_size);
        assert_eq!(facts.check(&config, rows), Ok(verdict));
    }
}

#[test]
fn a_tokenizer_of_another_generation_is_refused() {
    let all = [Family::ChatGlm, Family::ChatGlm2, Family::Glm4];
    let facts = [chatglm(false, Some(0)), chatglm2(None), glm4()];
    let models = [
        slim(),
        later(&[Family::ChatGlm2], 65_024, &[2], 0),
        later(&[Family::Glm4], 151_552, &GLM4_ENDS, 151_329),
    ];
    for (i, facts) in facts.iter().enumerate() {
        for (j, model) in models.iter().enumerate().filter(|(j, _)| *j != i) {
            let told = facts.check(model, None).map_err(|error| error.to_string());
            let expected = format!(
                "the tokenizer is that of {}, but config.json (vocab_size {}) describes a model of {}",
                all[i], model.vocab_size, all[j]
            );
            assert!(
                told.as_ref().is_err_and(|told| told.contains(&expected)),
                "{told:?}"
            );
            // Where config.json does not tell, the sizes or the ends of answers do.
            let mut vague = model.clone();
            vague.families = all.to_vec();
            assert!(facts.check(&vague, None).is_err(), "{facts:?} on {model:?}");
        }
    }
}

#[test]
fn ids_of_a_later_generation_that_differ_are_refused() {
    let told = |facts: TokenizerFacts, config: &ConfigIds| match facts.check(config, None) {
        Ok(verdict) => panic!("accepted: {verdict:?}"),
        Err(error) => error.to_string(),
    };
    let two = |vocab_size, eos| later(&[], vocab_size, &[eos], 0);
    let small = told(chatglm2(None), &two(60_000, 2));
    assert!(
        small.contains("has 64794 ids, but the model only 60000"),
        "{small}"
    );
    let large = told(chatglm2(None), &two(150_528, 2));
    assert!(large.contains("the model has 150528 ids"), "{large}");
    let end = told(chatglm2(None), &two(65_024, 130_005));
    assert!(
        end.contains("eos_token_id 130005, but the tokenizer's </s> is 2"),
        "{end}"
    );
    let mut ends = GLM4_ENDS.to_vec();
    ends.push(151_337);
    let end = told(glm4(), &later(&[], 151_552, &ends, 151_329));
    assert!(
        end.contains("eos_token_id 151337, but the tokenizer's <|endoftext|> is 151329"),
        "{end}"
    );
}
