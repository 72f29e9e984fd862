"""Attacks on trust: a hostile server, a hostile site, random servers, and the same among real processes.

``server.HostileServer`` asks real site agents for anything; ``site.run`` runs a real server with sites that answer
anything; ``model`` says in a page what may leave, and ``test_machine`` compares random servers with it; ``real`` does a
few of these through FLARE. ``RECORD.md`` lists how each test failed before the guarantees held.

Where each script that reproduced a finding went:

======================  ==================================================================================================
script                  test
======================  ==================================================================================================
privacy/attack_free     test_schedule: an approved private job does not leave unpaid under the name of a free one
privacy/attack_job      test_sums: two sums of one content never show one site [train-again]
privacy/attack_score    test_schedule: scores of training patients never leave
privacy/attack_sum 1    test_sums: a static statistic is summed over one roster (and in all runs)
privacy/attack_sum 2    test_sums: a sum holds the noise that the accounting counts on
privacy/collude         test_sums: one colluding site opens no vector
privacy/t_mime          test_schedule: a private study whose method sends exact gradients is refused or sends none
security/a1_jobs        test_schedule: what was not approved is not evaluated; a job of another name is not done; one round
                        trains once; no round is trained beyond those that were approved; test_real: a server job that asks
security/a2_data        test_approvals: the server chooses neither file nor column; names of classes leave only if the
                        hospital says so; nothing of the data is opened before a person has approved
security/a3_secure      test_sums: two sums of one content never show one site [train ]; a strict policy does not help
security/a4_replay      test_approvals: an approved arm runs once; the size of the model is what the data here say; a
                        changed method run is not the method run that was approved
security/a5_scores      test_schedule: no table of training patients can be read off scores
security/a6_weight      test_answers: a site that claims an immense weight does not replace the model
security/a8_local       test_real: no other process of the machine talks through a site's client
security/a10_small      test_approvals: no refusal tells how many patients there are
security/a11_unsigned   test_answers: a run of which no answer is signed does not finish; an answer that its site did not
                        sign is not used
security/toctou 1       test_approvals: a run request that changes between review and approval is not approved
security/toctou 2       test_approvals: one name never approves two studies
======================  ==================================================================================================

In other folders, because they attack no boundary between organizations: privacy/taint, sens (the release audit and DP-SGD), payable,
acct (accounting), rules, steps (the methods), memnull (membership verdicts), fedbuff_chk (asynchronous aggregation).
privacy/poly_study is empty.
"""
