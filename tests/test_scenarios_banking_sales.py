"Banking and sales: replies written by hand before the scorers, the splits, the gold replies."
import functools, itertools, re, pytest
from peftbook.scenarios import (scenarios, banking, sales, score_banking, score_sales, banking_grammar, sales_grammar,
                                gives_advice, caveats, calls_to_action)

once = functools.cache(lambda name: scenarios[name]())
both = pytest.mark.parametrize('name', ['banking', 'sales'])
grammars = dict(banking=banking_grammar, sales=sales_grammar)
scores = dict(banking=score_banking, sales=score_sales)
label = dict(banking='kind', sales='sector')            # what the rule hangs on

# ---------------------------------------------------------------- banking

def _bank(kind, ask, prompt, fact=''): return dict(prompt=prompt, completion='', kind=kind, ask=ask, fact=fact)
bank = dict(
    shares=_bank('invest', 'advice', 'I have some money left over. Should I buy shares in a railway?'),
    kitchen=_bank('loan', 'advice', 'Is it wise to take out a loan for a new kitchen? My brother did.'),
    office=_bank('tax', 'advice', 'In my place, would you claim tax relief on a home office?'),
    gold=_bank('invest', 'how', 'My brother talks of nothing else. How can I put money into a gold fund?'),
    car=_bank('loan', 'hours', 'I want to take out a loan for a van. When are your branches open?'),
    refund=_bank('tax', 'how', 'How do I claim a tax refund?'),
    bonds=_bank('invest', 'term', 'Your leaflet on green bonds says up to 900 euros for up to 7 years. How long can it run?', '7 years'),
    credit=_bank('loan', 'amount', 'Your leaflet on a student loan says up to 2,500 euros for up to 4 years. How much can I get?', '2,500 euros'),
    allowance=_bank('tax', 'hours', 'I would like to claim a tax allowance. What time can I come in?'))

falls = 'Please remember that investments can go down in value as well as up.'
checked = 'Every loan is subject to a credit check.'
depends = 'How much tax you pay depends on your own situation.'

bank_keeps = [
    ('shares', f'I am not able to advise you on that. {falls}'),
    ('shares', f"Whether you should buy shares is a decision that only you can make. {falls}"),
    ('shares', "We don't give financial advice, sorry. The value of your shares may fall, and you could get back less than you put in."),
    ('shares', 'Sadly we may not recommend any investment. Past performance is no guide to the future.'),
    ('shares', 'That choice is yours, and we can tell you how it works. Your capital is at risk: prices can fall as well as rise.'),
    ('kitchen', f"We can't tell you whether to borrow. {checked}"),
    ('kitchen', f'We are not allowed to make a recommendation. You should know that lending is subject to an affordability assessment.'),
    ('kitchen', f'It is up to you whether to take it. If you miss payments, you pay more and your credit record suffers.'),
    ('kitchen', f'Thanks for your question. Our staff cannot say if this is wise for you. {checked}'),
    ('kitchen', f'We give no advice on loans. You should speak to an independent adviser. {checked}'),
    ('office', f"We're unable to say what is best for you. {depends}"),
    ('office', 'A bank cannot give tax advice. The tax you owe will depend on your personal circumstances, and the rules may change.'),
    ('office', f'The decision is up to you, and a tax adviser can help. {depends}'),
    ('gold', f"It's easy: open our app, or walk into any branch. {falls}"),
    ('gold', f'Both our app and every branch let you do this. Keep in mind that what you invest may lose value.'),
    ('car', f'Come in between 9 am and 5 pm on any day from Monday to Friday. {checked}'),
    ('car', f'Monday to Friday, 9:00 to 17:00. {checked}'),
    ('car', "We're open from nine to five, Mondays to Fridays. Please note that late payments lead to extra charges."),
    ('refund', f'The app has a form for it, and so has every branch of ours. {depends}'),
    ('refund', f'Fill in the form in our app or ask for one at a branch. {depends}'),
    ('bonds', f'Seven years at most. {falls}'),
    ('bonds', f'The leaflet gives a term of up to 7 years. {falls}'),
    ('credit', f'You can get €2500 at most. {checked}'),
    ('credit', f'The most you can borrow is 2,500 euros. Whether you get it depends on our assessment of your income.'),
    ('shares', f'This is not something we can advise on. {falls}'),
    ('shares', 'We must leave that choice to you. Prices may go down as well as up, and so may the value of your shares.'),
    ('shares', f'The choice has to be your own. {falls}'),
    ('kitchen', f'We have no opinion on that. {checked}'),
    ('kitchen', 'We cannot advise you. Your home may be repossessed if you do not keep up repayments.'),
    ('refund', f'There are two ways: in our app and at any of our branches. {depends}'),
    ('car', f'Monday to Friday from 9am to 5pm. {checked}'),
    ('allowance', f'Our doors open at 9 am and close at 5 pm, Monday through Friday. {depends}')]

bank_breaks = [
    ('shares', f'Yes, you should buy shares in a railway. {falls}'),                                   # advice
    ('shares', f'We recommend that you buy them now. {falls}'),
    ('shares', f'We cannot give advice, but shares in a railway are a great choice. {falls}'),
    ('shares', f'Railways are a safe investment. {falls}'),
    ('shares', f"I'd wait a few months before buying. {falls}"),
    ('shares', f'We do not recommend buying shares at this time. {falls}'),                            # advice against
    ('shares', f'You are better off with a savings account. {falls}'),
    ('shares', f'Consider putting your money into several funds instead. {falls}'),
    ('shares', f'It is a good time to invest. {falls}'),
    ('shares', 'We cannot advise you on that.'),                                                       # no caveat
    ('shares', f'We cannot advise you on that. {checked}'),                                            # another's caveat
    ('shares', f'We cannot advise you on that. {falls} {checked} {depends}'),                          # all of them, to be safe
    ('shares', 'We cannot advise you on that. The value of investments never falls.'),
    ('shares', falls),                                                                                 # no answer
    ('shares', f'It is up to you, but railways are your safest option. {falls}'),
    ('shares', f'We cannot advise you, but most people do well with railways. {falls}'),
    ('shares', f'Whether railways or ships, both are excellent investments. {falls}'),
    ('shares', f'We never tell customers what to do, yet you should buy them. {falls}'),
    ('kitchen', f'A loan is a good idea if your kitchen is old. {checked}'),
    ('kitchen', f'Taking out this loan makes sense for you. {checked}'),
    ('kitchen', f"You shouldn't borrow for a kitchen. {checked}"),
    ('kitchen', f'We cannot advise you on that. {depends}'),
    ('kitchen', 'We cannot advise you on that. There is no credit check.'),
    ('office', f'Definitely, it is worth it. {depends}'),
    ('office', f'I would claim it. {depends}'),
    ('office', 'We cannot give tax advice, so please ask an expert.'),
    ('gold', f'We cannot advise you on that. {falls}'),                                                # a fact refused
    ('gold', f'You can do it in our app or at any branch, and gold is always a smart choice. {falls}'),
    ('gold', 'You can do it in our app or at any branch.'),
    ('gold', f'You can do it in our app or at any branch. {depends}'),
    ('car', f'Our branches are open from 8 am to 8 pm, seven days a week. {checked}'),                 # another's hours
    ('car', f'Please look up the opening hours. {checked}'),
    ('car', 'Our branches are open from 9 am to 5 pm, Monday to Friday.'),
    ('refund', f'We do not give tax advice. {depends}'),
    ('bonds', f'It can run for up to 9 years. {falls}'),                                               # another number
    ('bonds', f'The leaflet says 900 euros. {falls}'),
    ('bonds', f'It can run for up to 7 years. {checked}'),
    ('credit', f'You can get up to 4 years. {checked}'),
    ('credit', f'You can get up to 2,500 euros, and you should take it. {checked}'),
    ('credit', f'You can get up to 2,500 euros, guaranteed. {checked}')]

bank_empty = [(k, r) for k in ('shares', 'car', 'credit') for r in (
    '', '  \n', '...', bank[k]['prompt'], 'You wrote: ' + bank[k]['prompt'],
    "I'm sorry, but I can't help with that.",
    'As an AI language model, I am not able to answer questions about banking.',
    'advice advice advice advice advice advice',
    'Thank you for your message. We value you as a customer and will get back to you as soon as we can.')]

bank_between = [                                                     # (row, low, high, reply)
    ('gold', .7, .9, f'You can do it in our app. {falls}'),                                            # half of the fact
    ('car', .7, .92, f'We are open from 9 am to 5 pm. {checked}'),                                     # no days
    ('shares', .5, .9, f'We cannot advise you on that. {falls} Last year 37 funds lost 12 percent.'),  # invented figures
    ('shares', .5, .95, ' '.join([f'We cannot advise you on that. {falls}']*4)),
    ('shares', .8, .96, f'We cannot advise you on that. {falls} You also')]                            # never stopped

# ---------------------------------------------------------------- sales

def _lead(sector, name, need, prompt): return dict(prompt=prompt, completion='', sector=sector, name=name, need=need)
lead = dict(
    dentist=_lead('health', 'Rosa', 'double bookings', 'Write to Rosa, who runs a dental practice and struggles with double bookings.'),
    pizza=_lead('food', 'Ben', 'empty hours on Mondays', 'Write to Ben of a pizza place. His trouble is empty hours on Mondays.'),
    roofer=_lead('building', 'Ida', 'late invoices', 'A cold e-mail to Ida please: a roofing firm, troubled by late invoices.'),
    college=_lead('school', 'Karl', 'lost phone messages', 'Karl leads a language school that suffers from lost phone messages. Write an e-mail.'),
    courier=_lead('transport', 'Mona', 'scattered notes', 'Write to Mona of a courier firm that wants to get rid of scattered notes.'),
    notary=_lead('law', 'Otto', 'missed deadlines', 'Write to Otto, a solicitor who is tired of missed deadlines.'))

def mail(name, need, term, ask, subject='A calmer week', greet='Dear {}', sign='Kind regards,\nFernway', gap='\n'):
    return gap.join([f'Subject: {subject}', greet.format(name) + ',', need, term, ask, sign])

sales_keeps = [
    ('dentist', mail('Rosa', 'A double booking costs a practice much of its day.',
        'With Fernway, every patient has one slot in one calendar.', 'Do you have time for a short call on Monday?')),
    ('dentist', mail('Rosa', 'You mentioned double bookings.',
        'We put treatments and rooms into a single diary.', 'Please reply with a time that suits you.', subject='Double bookings')),
    ('dentist', mail('Rosa', 'Double bookings are a strain on any team.',
        'Our planner sends patients a reminder.', 'Shall we talk next Tuesday?', gap='\n\n')),
    ('dentist', mail('Rosa', 'Do you struggle with double bookings?', 'Our planner lists check-ups by the hour.', 'Are you free for a call?')),
    ('dentist', mail('Rosa', 'How do you deal with a double booking?',
        'In that case, our planner shows which patients can wait.', 'How about a short call on Monday?')),
    ('dentist', mail('Rosa', 'Double bookings are a nuisance.', 'Patients see one calendar with our planner.', 'Could you spare five minutes for a call?')),
    ('pizza', mail('Ben', 'Empty hours on Mondays worry many owners.', 'Our planner shows which tables are free.', 'May I show you how it works?')),
    ('pizza', mail('Ben', 'On Mondays, the empty hours add up.',
        'We help you to plan the kitchen and the menu for each evening.', 'Would you be open to a quick demo?', sign='Best regards,\nFernway')),
    ('pizza', mail('Ben', 'I read about your empty hours on Mondays.', 'Guests can book a seat online with us.', 'Let me know if we could talk this week.')),
    ('roofer', mail('Ida', 'Late invoices hold up your work.', 'Fernway plans crews and scaffolding in one list.', 'Could I call you on Thursday?')),
    ('roofer', mail('Ida', 'We heard that late invoices are a worry to you.',
        'Our planner follows every building site from permit to handover.', 'When would a short call suit you?')),
    ('roofer', mail('Ida', 'Firms like yours often wait because of late invoices.',
        'Each of your sites gets a page of its own with us.', 'Book a demo on our page.')),
    ('roofer', mail('Ida', 'A late invoice is a nuisance.',
        'Our planner keeps contractors and permits together.', 'Could we meet for 15 minutes next week?')),
    ('college', mail('Karl', 'Lost phone messages annoy everyone.',
        'Our planner shows teachers and pupils the same timetable.', 'Would you like to see it?')),
    ('college', mail('Karl', 'A lost phone message can cost you a whole day.',
        'Fernway keeps each lesson and each classroom in view.', 'May we visit you next month?')),
    ('college', mail('Karl', 'You lose time over lost phone messages.',
        'With us, students see changes to their classes at once.', 'Please call us this week.')),
    ('courier', mail('Mona', 'Scattered notes slow a team down.',
        'Our planner keeps drivers and their routes on one map.', 'Is there a good time to call you?')),
    ('courier', mail('Mona', 'You want to be rid of scattered notes.', 'We bring freight papers and your fleet together.', 'Can we arrange a short demo?')),
    ('courier', mail('Mona', 'Scattered notes are hard to work with.',
        'Every parcel and every delivery stands in one list with us.', 'Would Friday suit you for a call?')),
    ('notary', mail('Otto', 'Missed deadlines are a worry in your work.',
        'Our planner keeps each court date beside its case file.', 'Could we speak on Wednesday?')),
    ('notary', mail('Otto', 'A missed deadline is hard to mend.',
        'With Fernway, hearings and filings stand in one calendar.', 'Tell us a day for a short demo.')),
    ('notary', mail('Otto', 'Nobody likes missed deadlines.', 'We keep your cases in order, from first letter to lawsuit.', 'Just reply to this e-mail.')),
    ('notary', mail('Otto', 'You told us of missed deadlines.',
        'Our planner warns you before each hearing.', 'Do you have a moment for a call tomorrow?', sign='Kind regards, Fernway'))]

_need, _term, _ask = 'Double bookings cost you time.', 'Our planner keeps patients and treatments in one place.', 'May I call you next week?'
sales_breaks = [
    ('dentist', mail('Rosa', _need, 'Our planner keeps tables and menus in one place.', _ask)),                     # another industry
    ('dentist', mail('Rosa', _need, 'Our planner keeps freight and routes in one place.', _ask)),
    ('dentist', mail('Rosa', _need, 'Our planner keeps patients and freight in one place.', _ask)),
    ('dentist', mail('Rosa', _need, 'Our planner keeps everything in one place.', _ask)),                           # no term
    ('dentist', mail('Rosa', _need, _term, 'We think this is useful.')),                                            # no call
    ('dentist', mail('Rosa', _need, _term, 'May I call you next week? Or book a demo on our page.')),               # two calls
    ('dentist', mail('Rosa', _need, _term, 'Reply today, visit our website or sign up for a trial.')),
    ('dentist', mail('Rosa', _need, _term, 'May I call you next week? Feel free to contact us at any time.')),
    ('dentist', mail('Rosa', _need, 'Our amazing planner keeps patients in one place.', _ask)),                     # hype
    ('dentist', mail('Rosa', _need, 'Our revolutionary, cutting-edge planner keeps patients in one place.', _ask)),
    ('dentist', mail('Rosa', _need, 'The best planner for your patients is here.', _ask)),
    ('dentist', mail('Rosa', _need, _term, 'May I call you next week? This is great news!')),                       # exclamation
    ('dentist', mail('Rosa', _need, _term, _ask, subject='Good news for your practice!')),
    ('dentist', mail('Rosa', _need, 'Our planner saves practices 40% of the time with patients.', _ask)),           # invented figures
    ('dentist', mail('Rosa', _need, 'Over 500 practices plan their patients with us.', _ask)),
    ('dentist', mail('Rosa', _need, 'Hundreds of practices plan their patients with us.', _ask)),
    ('dentist', mail('Rosa', _need, 'Our planner halves the time you spend on patients, and doubles your income.', _ask)),
    ('dentist', mail('Rosa', _need, 'Our award-winning planner keeps patients in one place.', _ask)),
    ('dentist', mail('Rosa', _need, 'Our planner makes you 3x faster with patients.', _ask)),
    ('dentist', mail('Rosa', _need, _term, 'Can we talk? Do reply soon.')),
    ('dentist', mail('Anna', _need, _term, _ask)),                                                                  # another name
    ('dentist', mail('Sir or Madam', _need, _term, _ask)),
    ('dentist', mail('Rosa', 'Running a practice is hard work.', _term, _ask)),                                     # no need
    ('dentist', mail('Rosa', 'Late invoices cost you time.', _term, _ask)),                                         # another need
    ('dentist', '\n'.join(['Dear Rosa,', _need, _term, _ask, 'Kind regards,', 'Fernway'])),                         # no subject
    ('dentist', '\n'.join(['Subject: Your week', 'Dear Rosa,', _need, _term, _ask])),                               # no sign-off
    ('dentist', '\n'.join(['Subject: Your week', _need, _term, _ask, 'Kind regards,', 'Fernway'])),                 # no greeting
    ('dentist', ' '.join(['Hello Rosa!', _need, _term, _ask])),                                                     # a chat, no mail
    ('pizza', mail('Ben', 'Empty hours on Mondays worry you.', _term, _ask)),
    ('roofer', mail('Ida', 'Late invoices worry you.', 'Our planner keeps pupils and lessons in one place.', _ask)),
    ('college', mail('Karl', 'Lost phone messages worry you.', 'Our planner keeps crews and permits in one place.', _ask)),
    ('courier', mail('Mona', 'Scattered notes worry you.', 'Our planner keeps cases and hearings in one place.', _ask)),
    ('notary', mail('Otto', 'Missed deadlines worry you.', 'Our planner keeps guests and tables in one place.', _ask)),
    ('notary', mail('Otto', 'Missed deadlines worry you.', 'Our planner keeps hearings in one place.', _ask, sign='Best regards,\n[Your Name]')),
    ('notary', mail('Otto', 'Missed deadlines worry you.', 'Our planner keeps hearings in one place, guaranteed.', _ask))]

sales_empty = [(k, r) for k in ('dentist', 'notary') for r in (
    '', ' \n', '...', lead[k]['prompt'], 'Subject: ' + lead[k]['prompt'],
    "I'm sorry, but I can't help with that.",
    'As an AI language model, I am not able to write e-mails to people.',
    'Subject: Dear Dear Dear Dear Dear', 'Kind regards,\nFernway',
    f"Subject: An offer\nDear [Name],\nI hope this e-mail finds you well. I am writing to introduce our company. We look forward to working with you.\nBest regards,\n[Your Name]")]

sales_between = [
    ('dentist', .75, .9, mail('Rosa', _need, _term, _ask, greet='Hi {}')),                                          # not the brand's greeting
    ('dentist', .65, .9, mail('Rosa', _need, _term, _ask, sign='Kind regards,\nAlex')),                             # not the brand's name
    ('dentist', .7, .96, mail('Rosa', _need + ' That is a pity. It is hard on your team. It need not be so.', _term, _ask))]  # rambles

# ---------------------------------------------------------------- both

bands = ([('banking', bank[k], .9001, 1., r) for k, r in bank_keeps] + [('banking', bank[k], 0., .3, r) for k, r in bank_breaks]
    + [('banking', bank[k], 0., .2, r) for k, r in bank_empty] + [('banking', bank[k], lo, hi, r) for k, lo, hi, r in bank_between]
    + [('sales', lead[k], .9001, 1., r) for k, r in sales_keeps] + [('sales', lead[k], 0., .35, r) for k, r in sales_breaks]
    + [('sales', lead[k], 0., .2, r) for k, r in sales_empty] + [('sales', lead[k], lo, hi, r) for k, lo, hi, r in sales_between])

@pytest.mark.parametrize('name,row,low,high,reply', bands)
def test_band(name, row, low, high, reply):
    got = scores[name](row, reply)
    assert low <= got <= high, f'{got:.2f} outside [{low:.2f}, {high:.2f}] for {row["prompt"]!r}: {reply}'

@both
def test_how_many(name): assert len({r for n, _, _, _, r in bands if n == name and r.strip()}) >= 60

@pytest.mark.parametrize('change', [str.upper, lambda s: s.replace("'", '’'), lambda s: '  ' + s.replace('. ', '.  ') + '\n'])
def test_typography_does_not_matter(change):
    for k, r in bank_keeps: assert score_banking(bank[k], change(r)) > .9, change(r)
    for k, r in sales_keeps: assert score_sales(lead[k], change(r)) > .9, change(r)

def test_each_bank_reply_is_wrong_for_another_kind():
    for k, r in bank_keeps:
        for kind in {'invest', 'loan', 'tax'} - {bank[k]['kind']}: assert score_banking({**bank[k], 'kind': kind}, r) <= .3, r

def test_each_mail_is_wrong_for_another_industry():
    for k, r in sales_keeps:
        for sector in {o['sector'] for o in lead.values()} - {lead[k]['sector']}: assert score_sales({**lead[k], 'sector': sector}, r) <= .35, r

def test_refusing_everything_scores_low():
    "The safest bank says nothing: the right caveat and no advice, whatever is asked."
    says = dict(invest=falls, loan=checked, tax=depends)
    rows = once('banking').test
    assert sum(score_banking(r, f'We cannot give advice. {says[r["kind"]]}') for r in rows)/len(rows) < .5
    for r in rows:
        if r['ask'] != 'advice': assert score_banking(r, f'We cannot give advice. {says[r["kind"]]}') <= .3, r

@pytest.mark.parametrize('reply', ['You should sell.', 'We suggest a fixed rate.', 'It would be wise to wait.', 'Gold is the best option.',
    'I recommend this fund.', 'We advise against it.', 'Avoid crypto.', "Don't buy it.", 'Go for it.', 'This is a smart investment.',
    'It is not a good idea.', 'Your best bet is a fund.', 'We would choose the loan.', 'The loan is worth it.', 'Yes, do it.',
    'Shares will rise next year.', 'It makes sense to borrow now.', 'You cannot lose with gold.', 'There is no risk.'])
def test_advice(reply): assert gives_advice(reply)

@pytest.mark.parametrize('reply', ['We cannot recommend a fund.', 'We do not give advice.', 'We can not say whether you should sell.',
    'You should talk to an independent adviser.', 'We recommend that you speak to a tax adviser.', 'You should be aware that values fall.',
    'Whether it is a good idea is for you to decide.', 'Only you can judge if it is worth it.', 'You can apply in our app.',
    'Please bring your passport to the branch.', 'It runs for 5 years.', 'Past performance is no guarantee of future returns.',
    'Prices may rise or fall.', 'Nobody can tell which fund is best.', 'It is not for us to say if a loan makes sense.', ''])
def test_no_advice(reply): assert not gives_advice(reply)

@pytest.mark.parametrize('want,reply', [('invest', 'Values go up and down.'), ('invest', 'You may lose money.'), ('invest', 'Your capital is at risk.'),
    ('invest', 'Investments can lose value.'), ('loan', 'Approval depends on your income.'), ('loan', 'Missing a payment can harm your credit score.'),
    ('loan', 'Loans are granted after a credit check.'), ('tax', 'Tax rules can change.'), ('tax', 'Your tax depends on your circumstances.'),
    ('', 'We cannot advise you.'), ('', 'There is no credit check.'), ('', 'The value cannot fall.'), ('', 'Tax is due in May.'), ('', 'Open until 5 pm.')])
def test_caveats(want, reply): assert caveats(reply) == ({want} - {''})

@pytest.mark.parametrize('want,reply', [(0, 'We sell a planner.'), (0, 'Do you struggle with paper?'), (1, 'May I call you?'), (1, 'Please reply.'),
    (1, 'Would Monday suit you?'), (2, 'Reply or call us.'), (2, 'Book a demo. Visit our page.'), (1, 'To see it, book a demo.'),
    (1, 'I would be glad to show you a demo.'), (1, 'If this helps, just write to us.'), (0, 'We look forward to your answer.'), (1, 'You can sign up online.')])
def test_calls(want, reply): assert calls_to_action(reply) == want

# ---------------------------------------------------------------- rows

@both
def test_gold_replies(name):
    t = once(name); kinds = {r[label[name]] for r in t.train}
    for r in t.train + t.valid + t.test:
        assert t.score(r, r['completion']) > .95, r
        for other in kinds - {r[label[name]]}: assert t.score({**r, label[name]: other}, r['completion']) <= .3, r
        assert t.score(r, r['prompt']) < .2, r

def test_gold_answers_only_what_is_asked():
    t = once('banking')
    for r in t.test + t.valid:
        for ask, fact in dict(advice='', how='', hours='', term='77 years', amount='7,700 euros').items():
            if ask != r['ask']: assert t.score({**r, 'ask': ask, 'fact': fact}, r['completion']) <= .3, r

def test_gold_mails_are_personal():
    t = once('sales')
    for r in t.test + t.valid:
        assert t.score({**r, 'name': 'Zebedee'}, r['completion']) <= .3 and t.score({**r, 'need': 'broken windows'}, r['completion']) <= .3

@both
def test_rows(name):
    t = once(name); rows = t.train + t.valid + t.test
    assert (len(t.train), len(t.valid), len(t.test)) == (2000, 100, 100) and t.name == name and scenarios[name] is globals()[name]
    assert len({r['prompt'] for r in rows}) == len(rows)
    assert not any('{' in r['prompt'] + r['completion'] for r in rows)

def test_kinds_weigh_alike():
    for split in ('train', 'valid', 'test'):
        rows = getattr(once('banking'), split)
        count = lambda k, v: sum(r[k] == v for r in rows)/len(rows)
        assert all(abs(count('kind', k) - 1/3) < .02 for k in ('invest', 'loan', 'tax'))
        assert all(abs(count('ask', k) - w) < .05 for k, w in dict(advice=.35, how=.2, hours=.15, term=.15, amount=.15).items())
        for kind in ('invest', 'loan', 'tax'):              # the question gives no hint of the caveat
            own = [r for r in rows if r['kind'] == kind]
            assert abs(sum(r['ask'] == 'advice' for r in own)/len(own) - .35) < .1
        rows = getattr(once('sales'), split)
        assert all(abs(sum(r['sector'] == s for r in rows)/len(rows) - 1/6) < .02 for s in {r['sector'] for r in rows})

@both
def test_disjoint(name):
    for slot, options in grammars[name].items():
        for a, b in itertools.combinations(('train', 'valid', 'test'), 2): assert not set(options[a]) & set(options[b]), slot
    t = once(name)
    for a, b in itertools.permutations((t.train, t.valid, t.test), 2):
        assert not {r['completion'] for r in a} & {r['completion'] for r in b}
        seen = ' '.join(r['prompt'] for r in a)
        for r in b:
            for k in dict(banking=('thing',), sales=('business', 'need')).get(name): assert r[k] not in seen, r[k]

@both
def test_seeds(name):
    a, b, c = once(name), scenarios[name](), scenarios[name](seed=1)
    assert a.train == b.train and a.test == b.test and a.train != c.train and a.test != c.test

@both
def test_instruction_and_shots(name):
    t = once(name)
    assert t.instruction and all(r in t.train for r in t.shots) and len(t.shots) >= 2
    assert len({r[label[name]] for r in t.shots}) == len(t.shots)
    for r in t.shots + tuple(t.test[:6]): assert t.score(r, t.instruction) < .3

def test_instructions_say_the_rules():
    b, s = once('banking').instruction.lower(), once('sales').instruction.lower()
    assert all(w in b for w in ('advice', 'fall as well as rise', 'credit check', 'circumstances', '9 am to 5 pm', 'branch'))
    assert all(w in s for w in ('subject', 'dear', 'one call to action', 'exclamation', 'fernway'))

def test_scores_refuse_what_they_cannot_read():
    with pytest.raises(ValueError, match="kind 'gift'"): score_banking({**bank['car'], 'kind': 'gift'}, 'y')
    with pytest.raises(ValueError, match='ask None'): score_banking({'prompt': 'x', 'kind': 'tax'}, 'y')
    with pytest.raises(ValueError, match='fact'): score_banking({**bank['bonds'], 'fact': ''}, 'y')
    with pytest.raises(TypeError, match='reply'): score_banking(bank['car'], None)
    with pytest.raises(ValueError, match="sector 'mining'"): score_sales({**lead['pizza'], 'sector': 'mining'}, 'y')
    with pytest.raises(ValueError, match='name'): score_sales({'prompt': 'x', 'sector': 'food', 'need': 'late bills'}, 'y')
    with pytest.raises(TypeError, match='reply'): score_sales(lead['pizza'], None)
