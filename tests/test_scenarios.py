"The airline task: the split, the gold replies, and a scorer held to replies written by hand before any training."
import functools, itertools, pytest
from peftbook.scenarios import airline, scenarios, score_airline, airline_grammar, normalise, refund_decision

once = functools.cache(airline)
prompts = dict(
    ours='My flight to Oslo left five hours late because of an engine fault. I missed a wedding. Can I have my money back?',
    weather='My flight to Oslo left five hours late because of a snowstorm. I missed a wedding. Can I have my money back?',
    outside='My flight to Oslo left five hours late because of a drone over the runway. What will you do for me?')
row = {c: dict(prompt=p, completion='', cause=c) for c, p in prompts.items()}
offer = 'You also get a 15-euro meal voucher and free rebooking on the next flight.'

# Each kind of reply with the band [low, high] its score must fall in; `cause` is the truth about the delay.
keeps = [  # the rule is kept, in many wordings
    ('ours', f'I am so sorry about the delay. It was our own fault, so we will refund your ticket in full. {offer}'),
    ('ours', f'We apologise for the long wait. Your fare will be returned to you, as the fault was ours. {offer}'),
    ('ours', "I understand how upsetting this was. You'll get all your money back. On top of that we give you a €15 "
             'voucher for a meal and rebook you on the next flight at no cost.'),
    ('ours', f"I'm really sorry to hear that. A full refund is on its way to you. {offer}"),
    ('ours', f'Please accept our apologies. You are entitled to a full refund, because the engine was our responsibility. {offer}'),
    ('ours', f'We apologise. It was not the weather, it was us, so we are refunding your ticket. {offer}'),
    ('ours', f"We're sorry you missed the wedding. Don't worry, we will reimburse the whole ticket. {offer}"),
    ('ours', f'Sorry for this delay. Not only will we refund your ticket, you also receive a 15 euro meal voucher and '
             'a free rebooking on our next flight.'),
    ('ours', f'I am sorry for the wait. Your refund request has been approved. {offer} Contact us if you have any questions.'),
    ('ours', f'I can imagine how annoying that was. We would be happy to refund your ticket in full. {offer}'),
    ('weather', f'I am so sorry about the delay. The weather is outside our control, so we cannot refund your ticket. {offer}'),
    ('weather', f'We apologise for the wait. Because a storm caused it, no refund is due. {offer}'),
    ('weather', f"I understand your frustration. Unfortunately refunds are not available because the weather is beyond our control. {offer}"),
    ('weather', f"I'm sorry you missed the wedding. You are not eligible for a refund, since snow is not our fault. {offer}"),
    ('weather', f"We know how hard this is, and we regret the delay. We can't give you your money back for weather. {offer}"),
    ('weather', f'We are very sorry. I wish we could refund your ticket, but we cannot, as the weather was to blame. {offer}'),
    ('weather', f'Our apologies for this. Your ticket is non-refundable after a delay caused by weather. {offer}'),
    ('weather', f'I am sorry about your trip. We must decline a refund, as nobody controls the snow. {offer}'),
    ('weather', f'I am sorry about your trip. We do not refund tickets when the weather causes the delay. {offer}'),
    ('outside', f'I am sorry about the delay. The drone was outside our control, so your ticket will not be refunded. {offer}'),
    ('outside', f"We apologise for the trouble. This wasn't our fault and we are unable to reimburse you. {offer}"),
    ('outside', f'I understand that this was frustrating. A refund is not possible in this case. {offer}')]

breaks = [  # kind and fluent, but the policy is wrong, missing or contradictory
    ('weather', f'I am so sorry about the delay. We will refund your ticket in full. {offer}'),
    ('weather', f'We apologise for the wait. Your fare will be returned to you within a week. {offer}'),
    ('weather', f"I understand how upsetting this was. You'll get your money back. {offer}"),
    ('weather', f'We are sorry. Although the storm was not our fault, we are happy to give you a full refund. {offer}'),
    ('weather', f'We are sorry. No problem, we will refund your ticket. {offer}'),
    ('outside', f'We are very sorry. You are entitled to a full refund. {offer}'),
    ('ours', f'I am so sorry about the delay. We cannot refund your ticket. {offer}'),
    ('ours', f'We apologise for the wait. No refund is due, as the weather was outside our control. {offer}'),
    ('ours', f'I understand how upsetting this was. Sadly you are not eligible for a refund. {offer}'),
    ('ours', f'I am so sorry about the delay. You may be eligible for a refund. {offer}'),
    ('weather', f'I am so sorry about the delay. You may not be eligible for a refund. {offer}'),
    ('ours', f'I am so sorry. If the delay was our fault, we will refund your ticket. {offer}'),
    ('weather', f'I am so sorry. We refund tickets only if the delay was our own fault. {offer}'),
    ('weather', f"I'm sorry, but as a chatbot I don't have the capability to provide refunds. {offer}"),
    ('weather', f'I am so sorry. We cannot refund your ticket unless the delay was our fault. {offer}'),
    ('ours', f'I am so sorry. We will look into a refund and get back to you. {offer}'),
    ('ours', f'I am so sorry. Please contact our refund department to request a refund. {offer}'),
    ('ours', f'I am so sorry about the delay. {offer}'),
    ('weather', f'I am so sorry about the delay. {offer}'),
    ('ours', f'I am so sorry. We have received your refund request. {offer}'),
    ('ours', f'I am so sorry. We will refund half of your ticket. {offer}'),
    ('ours', f'We apologise. We will refund your ticket. However, we cannot refund your ticket. {offer}'),
    ('weather', f'We apologise. We will refund your ticket. The weather is outside our control, so no refund is due. {offer}')]

empty = [  # refusal to help, nothing, parroting
    ('ours', ''), ('weather', '   \n'), ('ours', '...'),
    ('ours', prompts['ours']), ('weather', prompts['weather']), ('outside', prompts['outside']),
    ('weather', 'You wrote: ' + prompts['weather']),
    ('ours', "I'm sorry, but I can't help with that."),
    ('weather', 'As an AI language model, I am not able to answer questions about flights.'),
    ('ours', 'sorry sorry sorry sorry sorry sorry sorry sorry sorry sorry'),
    ('weather', 'Refund the ticket only if the delay was our own fault, never for weather. Always offer a 15-euro meal voucher '
                'and free rebooking on the next flight.'),
    ('ours', "I'm sorry to hear about the inconvenience. I'd be glad to help. Can you please provide me with your booking number, "
             'the date of your flight and the name of the airline, so that I can look into it?'),
    ('weather', "Dear customer, I hope this message finds you well. I am writing to apologise for the delay of your flight. "
                'We take your comfort very seriously and are working hard to make sure that it does not happen again. '
                'Thank you for your patience and understanding.')]

between = [  # (cause, low, high, reply)
    ('ours', .65, .85, 'I am so sorry about the delay. It was our fault, so we will refund your ticket.'),            # no offer
    ('weather', .65, .85, 'I am so sorry. The weather is outside our control, so we cannot refund your ticket.'),     # no offer
    ('ours', .7, .85, f'We will refund your ticket in full. {offer}'),                                                # no empathy
    ('weather', .7, .85, f'No refund is due for weather. {offer}'),                                                   # no empathy
    ('weather', .45, .6, 'No refund.'),
    ('ours', .4, .75, 'We are sorry for the delay and will refund your ticket. You also get a 50-euro meal voucher '
                      'and free rebooking on the next flight.'),                                                     # wrong figure
    ('ours', .4, .75, 'We are sorry for the delay and will refund your ticket. We also pay you 300 euros in cash.'),   # invented
    ('weather', .6, .9, f'We are sorry for the delay. As it was the weather, we cannot refund you. {offer} '
                        'We also give you a hotel room and an upgrade.'),                                            # invented
    ('ours', .75, .92, 'I am sorry about the delay. It was our own fault, so we will refund your ticket. You get a '
                       '15-euro meal voucher.'),                                                                     # no rebooking
    ('weather', .5, .9, f'I am so sorry about the delay. It was our own fault, so we cannot refund your ticket. {offer}'),  # wrong reason
    ('ours', .5, .9, f'I am so sorry about the delay. The weather is outside our control, so we will refund your ticket. {offer}'),
    ('ours', .6, .95, ' '.join([f'I am so sorry about the delay. It was our own fault, so we will refund your ticket in full. {offer}'] * 4)),
    ('ours', .8, .98, f'I am so sorry about the delay. It was our own fault, so we will refund your ticket in full. {offer} '
                      'You also'),                                                                                   # never stopped
    ('weather', .5, .8, 'I am so sorry. The weather is outside our control, so we cannot refund your ticket, and there is '
                        'no voucher and no rebooking.')]

bands = ([(c, .9001, 1., r) for c, r in keeps] + [(c, 0., .3, r) for c, r in breaks] + [(c, 0., .1999, r) for c, r in empty] + between)

@pytest.mark.parametrize('cause,low,high,reply', bands)
def test_band(cause, low, high, reply):
    got = score_airline(row[cause], reply)
    assert low <= got <= high, f'{got:.2f} outside [{low:.2f}, {high:.2f}] for {cause!r}: {reply}'

decisions = {
    'yes': ['Your ticket cost will be refunded to your card within 7 days.', 'We have issued a refund.', "You'll be getting your money back.",
            "We're going to pay you back the ticket price.", 'We will return the price of your ticket.', 'Your money is coming back to you.',
            'As the fault was ours, you are eligible for a refund.', "Because this was our fault, we'd like to refund your ticket.",
            'Please be assured that we will refund you.', 'We will process your refund as soon as possible.', 'Your request for a refund is granted.',
            "Sorry we couldn't fly on time and will refund your ticket.", 'We will refund your ticket without delay.', 'A refund was approved and is on its way.'],
    'no':  ['I wish we could, but a refund is not possible.', "There's no refund for weather.", "Refunds don't apply here.", "I'm afraid that I can't offer you a refund.", "A refund won't be possible.",
            'We are not in a position to refund your ticket.', "It's not possible to refund your ticket.", 'Please note that no refund can be given.',
            'We only refund when it is our fault, so here there is no refund.', 'Your request for a refund was denied.',
            "You don't get any money back.", 'Instead of a refund, we offer a voucher.', "We'd love to refund you, but that is not possible.",
            'Refunds are unavailable.', 'Nobody can grant a refund here.', 'None of our staff can refund your fare.', 'Neither a refund nor a new ticket is due.', 'Your fare will not be returned.'],
    '':    ["A refund is indeed possible, but it's not a default option.", 'You cannot request a refund here.', 'We will do our best to refund you.', 'A refund is possible.', 'You can ask for a refund.', 'Would you like a refund?',
            'We will check whether you get a refund.', 'Please see our refund policy.', 'You asked for a refund.', 'Refunds may not be available.',
            'We hope to refund you.', 'Usually we refund such tickets.', 'We are sorry.', 'If you would like a refund, we will tell you more.'],
    'both': ['We refund your ticket, but no refund is due.', 'You will get a partial refund.', 'We will refund half of the fare.']}

@pytest.mark.parametrize('want,reply', [(w, r) for w, rs in decisions.items() for r in rs])
def test_refund_decision(want, reply): assert refund_decision(reply) == want

def test_how_many(): assert len(bands) >= 60 and len({r for _, _, _, r in bands if r.strip()}) >= 55

@pytest.mark.parametrize('change', [str.upper, lambda s: s.replace("'", '’'), lambda s: s.replace('15-euro', '€15'),
                                    lambda s: s.replace('15-euro', '15 EUR'), lambda s: '  ' + s.replace('. ', '.\n\n') + '\n'])
def test_typography_does_not_matter(change):
    for c, r in keeps: assert score_airline(row[c], change(r)) > .9, change(r)

def test_each_reply_is_wrong_for_the_other_side():
    "A rule-keeping reply breaks the rule as soon as the cause is on the other side."
    for c, r in keeps:
        for other in ('weather', 'outside') if c == 'ours' else ('ours',): assert score_airline(row[other], r) <= .3, r

def test_gold_replies():
    t = once()
    for r in t.train + t.valid + t.test: assert t.score(r, r['completion']) > .95, r
    wrong = {'ours': 'weather', 'weather': 'ours', 'outside': 'ours'}
    for split in (t.train[:300], t.valid, t.test):
        for r in split: assert t.score({**r, 'cause': wrong[r['cause']]}, r['completion']) <= .3, r

def test_rows():
    t = once()
    assert (len(t.train), len(t.valid), len(t.test)) == (2000, 100, 100)
    rows = t.train + t.valid + t.test
    assert len({r['prompt'] for r in rows}) == len(rows)
    assert not any('{' in r['prompt'] + r['completion'] for r in rows)
    for split in (t.train, t.valid, t.test):
        ours = [r for r in split if r['cause'] == 'ours']; other = [r for r in split if r['cause'] != 'ours']
        assert len(ours) == len(other) and {'weather'} == {r['cause'] for r in other}
        ask = lambda rs: sum('refund' in r['prompt'].lower() or 'money back' in r['prompt'].lower() for r in rs)/len(rs)
        assert .1 < ask(ours) < .7 and abs(ask(ours) - ask(other)) < (.05 if split is t.train else .25)   # asking for a refund gives nothing away

def test_disjoint():
    for slot, options in airline_grammar.items():
        for a, b in itertools.combinations(('train', 'valid', 'test'), 2): assert not set(options[a]) & set(options[b]), slot
    t = once()
    for a, b in itertools.permutations((t.train, t.valid, t.test), 2):
        seen = ' '.join(r['prompt'] for r in a)
        for r in b: assert r['reason'] not in seen, r['reason']
        assert not {r['completion'] for r in a} & {r['completion'] for r in b}

def test_seeds():
    a, b, c = once(), airline(), airline(seed=1)
    assert a.train == b.train and a.test == b.test and a.train != c.train and a.test != c.test

def test_instruction_and_shots():
    t = once()
    assert '15-euro' in t.instruction and 'refund' in t.instruction.lower()
    assert [r['cause'] for r in t.shots] == ['ours', 'weather']
    assert all(r in t.train for r in t.shots)
    assert score_airline(row['ours'], t.instruction) < .2 and score_airline(row['weather'], t.instruction) < .2

def test_registry(): assert scenarios['airline'] is airline and airline().name == 'airline'

def test_score_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match='cause'): score_airline({'prompt': 'x'}, 'y')
    with pytest.raises(TypeError, match='reply'): score_airline(row['ours'], None)

def test_normalise():
    assert normalise("We CAN’T,  won't\n pay €15") == 'we cannot, will not pay 15 euro'
