//! Properties of the choice, on logits small enough to count.

use super::*;

const LOGITS: [f32; 6] = [0.5, 2.0, -1.0, 1.5, -3.0, 0.0];

fn first(token: u32) -> Draw {
    Draw { prompt: 0, token }
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let total: f64 = logits.iter().map(|x| x.exp()).sum();
    logits.iter().map(|x| x.exp() / total).collect()
}

/// Some hundred vectors of logits, with ties in every third.
fn vectors() -> impl Iterator<Item = Vec<f32>> {
    (0..300).map(|n| {
        let mut stream = Key::new(n, Domain::Shuffle).stream();
        let length = 1 + stream.below(40) as usize;
        let value = |stream: &mut crate::random::Stream| match n % 3 {
            0 => (stream.below(5) as f32) - 2.0,
            _ => 4.0 * stream.normal(),
        };
        (0..length).map(|_| value(&mut stream)).collect()
    })
}

#[test]
fn draws_follow_the_distribution_within_sampling_error() {
    let cases = [
        Sampling::plain(),
        Sampling {
            temperature: 0.5,
            ..Sampling::plain()
        },
        Sampling {
            temperature: 2.0,
            top_k: 4,
            ..Sampling::plain()
        },
        Sampling {
            top_p: 0.8,
            repetition_penalty: 1.5,
            ..Sampling::plain()
        },
    ];
    let draws = 40_000;
    for sampling in cases {
        let expected = distribution(&LOGITS, &[1, 4], &sampling).unwrap();
        let mut counts = [0_u32; LOGITS.len()];
        for token in 0..draws {
            let id = choose(&LOGITS, &[1, 4], &sampling, first(token)).unwrap();
            counts[id as usize] += 1;
        }
        for id in 0..LOGITS.len() as u32 {
            let share = expected.iter().find(|(other, _)| *other == id);
            let share = share.map_or(0.0, |(_, share)| *share);
            let mean = share * f64::from(draws);
            let deviation = (mean * (1.0 - share)).sqrt();
            let found = f64::from(counts[id as usize]);
            // Five standard deviations: with fixed seeds it holds or it does not.
            assert!(
                (found - mean).abs() <= 5.0 * deviation,
                "{sampling:?}: {id}: {found} of {mean}"
            );
        }
    }
}

#[test]
fn the_distribution_is_the_definitions() {
    let plain = Sampling::plain();
    let shares = |sampling: &Sampling| distribution(&LOGITS, &[], sampling).unwrap();
    let ids = |sampling: &Sampling| {
        shares(sampling)
            .iter()
            .map(|(id, _)| *id)
            .collect::<Vec<_>>()
    };
    let close = |found: &[(u32, f64)], expected: &[f64]| {
        assert_eq!(found.len(), expected.len());
        for ((_, found), expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    };
    close(&shares(&plain), &softmax(&LOGITS.map(f64::from)));
    let hot = Sampling {
        temperature: 2.0,
        ..plain
    };
    close(&shares(&hot), &softmax(&LOGITS.map(|x| f64::from(x) / 2.0)));
    let top = Sampling { top_k: 3, ..plain };
    assert_eq!(ids(&top), [0, 1, 3]);
    close(&shares(&top), &softmax(&[0.5, 2.0, 1.5]));
    // Probabilities in order: 0.495, 0.300, 0.110, 0.067, ..
    for (top_p, expected) in [
        (0.0, &[1][..]),
        (0.4, &[1]),
        (0.5, &[1, 3]),
        (0.75, &[1, 3]),
        (0.8, &[0, 1, 3]),
        (0.92, &[0, 1, 3, 5]),
        (1.0, &[0, 1, 2, 3, 4, 5]),
    ] {
        assert_eq!(ids(&Sampling { top_p, ..plain }), expected, "{top_p}");
    }
    // top_p counts the probabilities that temperature and top_k leave: 0.62 and 0.38.
    assert_eq!(
        ids(&Sampling {
            top_k: 2,
            top_p: 0.6,
            ..plain
        }),
        [1]
    );
    assert_eq!(
        ids(&Sampling {
            top_k: 2,
            top_p: 0.63,
            ..plain
        }),
        [1, 3]
    );
    assert_eq!(
        ids(&Sampling {
            temperature: 0.1,
            top_p: 0.9,
            ..plain
        }),
        [1]
    );
}

#[test]
fn a_top_p_that_is_reached_exactly_is_enough() {
    let logits = [2.0_f32.ln(), 0.0, 0.0];
    let shares = |top_p| {
        distribution(
            &logits,
            &[],
            &Sampling {
                top_p,
                ..Sampling::plain()
            },
        )
    };
    let ids = |top_p| {
        shares(top_p)
            .unwrap()
            .iter()
            .map(|s| s.0)
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(0.5 - 1e-6), [0]);
    assert_eq!(ids(0.5 + 1e-6), [0, 1], "of equals the lower id stays");
    assert_eq!(ids(0.75 + 1e-6), [0, 1, 2]);
}

#[test]
fn equals_of_the_kth_all_stay() {
    let logits = [1.0, 3.0, 1.0, 2.0, 1.0];
    for (top_k, expected) in [
        (1, &[1][..]),
        (2, &[1, 3]),
        (3, &[0, 1, 2, 3, 4]),
        (5, &[0, 1, 2, 3, 4]),
        (6, &[0, 1, 2, 3, 4]),
        (0, &[0, 1, 2, 3, 4]),
    ] {
        let sampling = Sampling {
            top_k,
            ..Sampling::plain()
        };
        let shares = distribution(&logits, &[], &sampling).unwrap();
        assert_eq!(
            shares.iter().map(|s| s.0).collect::<Vec<_>>(),
            expected,
            "{top_k}"
        );
    }
}

#[test]
fn the_narrowest_settings_are_greedy() {
    for (n, logits) in (0..).zip(vectors()) {
        let greedy = choose(&logits, &[0, 3], &Sampling::greedy(), first(n)).unwrap();
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let lowest = logits.iter().position(|&logit| logit == largest).unwrap();
        assert_eq!(greedy as usize, lowest);
        for top_p in [0.0, 1e-9] {
            let sampling = Sampling {
                top_p,
                ..Sampling::plain()
            };
            assert_eq!(choose(&logits, &[], &sampling, first(n)), Ok(greedy));
        }
        let one = Sampling {
            top_k: 1,
            ..Sampling::plain()
        };
        let chosen = choose(&logits, &[], &one, first(n)).unwrap();
        assert_eq!(logits[chosen as usize], largest);
        let cold = Sampling {
            temperature: 1e-300,
            ..Sampling::plain()
        };
        let chosen = choose(&logits, &[], &cold, first(n)).unwrap();
        assert_eq!(logits[chosen as usize], largest);
        if n % 3 != 0 {
            assert_eq!(chosen, greedy);
        }
    }
}

#[test]
fn a_draw_depends_on_seed_prompt_and_token_alone() {
    let flat = [0.0; 1000];
    let plain = Sampling::plain();
    let chosen = |seed, prompt, token| {
        let draw = Draw { prompt, token };
        choose(&flat, &[], &Sampling { seed, ..plain }, draw).unwrap()
    };
    let mut all = std::collections::HashSet::new();
    for seed in [0, 1, 1 << 40] {
        for prompt in 0..5 {
            for token in 0..20 {
                let id = chosen(seed, prompt, token);
                assert_eq!(id, chosen(seed, prompt, token));
                all.insert(id);
            }
        }
    }
    // 300 draws from 1,000: about 259 differ.
    assert!(all.len() > 235, "{}", all.len());
}

#[test]
fn the_penalty_makes_seen_ids_less_likely_whatever_their_sign() {
    let penalty = |repetition_penalty| Sampling {
        repetition_penalty,
        ..Sampling::plain()
    };
    let scores = |seen: &[u32], p| penalised(&LOGITS, seen, &penalty(p)).unwrap();
    assert_eq!(scores(&[], 2.0), LOGITS);
    assert_eq!(scores(&[0, 1, 2, 3, 4, 5], 1.0), LOGITS);
    // Positive ones are halved, negative ones doubled, zero stays; repetition counts once.
    assert_eq!(
        scores(&[1, 2, 2, 5, 1, 99], 2.0),
        [0.5, 1.0, -2.0, 1.5, -3.0, 0.0]
    );
    // Below 1 it rewards.
    assert_eq!(scores(&[1, 2], 0.5), [0.5, 4.0, -0.5, 1.5, -3.0, 0.0]);
    let greedy = Sampling {
        repetition_penalty: 1.5,
        ..Sampling::greedy()
    };
    assert_eq!(choose(&LOGITS, &[1], &greedy, first(0)), Ok(3));
    // What would overflow stays a number.
    let huge = [f32::MAX, f32::MIN];
    let found = distribution(&huge, &[0, 1], &penalty(1e-30)).unwrap();
    assert_eq!(found[0], (0, 1.0));
}

#[test]
fn logits_that_are_no_numbers_are_told() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for sampling in [Sampling::greedy(), Sampling::plain()] {
            let error = choose(&[0.0, value, 1.0, f32::NAN], &[], &sampling, first(0)).unwrap_err();
            assert_eq!((error.id, error.count, error.of), (1, 2, 4));
            assert!(
                error
                    .to_string()
                    .contains("2 of the 4 logits are not finite")
            );
        }
    }
}
