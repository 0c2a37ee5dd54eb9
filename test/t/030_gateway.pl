# The gateway: what it answers, what it withstands, how it ends.

use strict;
use warnings;

use Errno qw(ECONNREFUSED);
use FindBin;
use lib "$FindBin::RealBin/../perl";

use IO::Compress::Gzip qw(gzip);
use IO::Socket::INET;
use IO::Socket::SSL;
use JSON::PP;
use POSIX qw(WNOHANG);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmGateway;
use Test::More;
use Time::HiRes qw(sleep time);

my $patience = $PostgreSQL::Test::Utils::timeout_default;
my $program = program();
my $node = start_central();
my $token = token('b1');
my $other = token('b2');

# The command line.
command_like([ $program, '--help' ], qr/--listen HOST:PORT/, '--help');
command_like([ $program, '--version' ], qr/^softmobile-gateway \d/, '--version');
for my $arguments ([ '--timeout', 'x' ], [ '--timeout', '0' ], [ '--listen', 'here' ], [ '--listen', 'h:99999' ], ['more'], ['--unknown'], [ '--tls-cert', 'x' ])
{
	command_exit_is([ $program, @$arguments ], 2, "refused: @$arguments");
}

my $gateway = start_gateway('--max-body', '1', '--max-unpacked', '2');
command_exit_is([ $program, '--listen', "127.0.0.1:$gateway->{port}" ], 1, 'a port that is taken');

# Receipts.
my $first = batch(event(1), event(2));
my $receipt = is_receipt(post($gateway, $first), 2, 0, 'a batch');
is_deeply($receipt->{results}, [], 'nothing to say about its events');
is_receipt(post($gateway, $first), 0, 2, 'a replay');
is_receipt(request($gateway, 'POST', '/some/where/events', batch(event(3))), 1, 0, 'below a path');
is_receipt(post($gateway, batch(event(4)), 'content-type' => 'application/json'), 1, 0, 'as plain JSON');
my $zipped;
my $plain = batch(event(6), event(5));
gzip(\$plain => \$zipped);
is_receipt(post($gateway, $zipped, 'content-encoding' => 'gzip'), 2, 0, 'compressed');
is_receipt(post($gateway, sub { my $part = substr $plain, 0, 100, ''; return length $part ? $part : undef }), 0, 2, 'in chunks');
my @again = split //, $zipped;
is_receipt(post($gateway, sub { shift @again }, 'content-encoding' => 'gzip'), 0, 2, 'compressed, byte by byte');
is_receipt(post($gateway, '[]'), 0, 0, 'an empty batch');
$receipt = is_receipt(post($gateway, batch(event(7, lane => 'urgent'), event(8))), 1, 0, 'a batch with a bad event');
is($receipt->{results}[0]{status}, 'rejected', 'which is rejected');
$receipt = is_receipt(post($gateway, batch(event(9, subject => '8', data => { new => { folio => 9 } }))), 0, 0, 'a batch with a conflict');
is_deeply($receipt->{results}[0]{current}, { folio => 8 }, 'which shows central\'s row');
is_receipt(post($gateway, batch(event(10, reason => "Devoluci\x{f3}n \x{20ac}"))), 1, 0, 'UTF-8');
is($node->safe_psql('postgres', q{SELECT reason = E'Devoluci\u00f3n \u20ac' FROM softmobile.central_inbox WHERE seq = 10}), 't', 'is stored as such');
my $health = request($gateway, 'GET', '/health');
is_deeply([ $health->{status}, decode_json($health->{content}) ], [ 200, { status => 'ok' } ], 'health');

# Refusals.
is_problem(request($gateway, 'GET', '/nothing'), 404, 'no such route');
is_problem(request($gateway, 'GET', '/events'), 405, 'GET /events');
is(request($gateway, 'GET', '/events')->{headers}{allow}, 'POST', 'with Allow');
is_problem(post($gateway, '[]', authorization => undef), 401, 'no token');
is(post($gateway, '[]', authorization => undef)->{headers}{'www-authenticate'}, 'Bearer', 'with WWW-Authenticate');
is_problem(post($gateway, '[]', authorization => "Basic $token"), 401, 'another scheme');
is_problem(post($gateway, '[]', authorization => 'Bearer wrong'), 401, 'a wrong token', qr/token is not valid/);
is_problem(post($gateway, batch(event(11)), authorization => "Bearer $other"), 403, 'another branch\'s token', qr/"b1"/);
is_problem(post($gateway, '[]', 'content-type' => 'text/plain'), 415, 'another type');
is_problem(post($gateway, '[]', 'content-type' => undef), 415, 'no type');
is_problem(post($gateway, '[]', 'content-encoding' => 'br'), 415, 'another compression');
is_problem(post($gateway, ''), 400, 'no body');
is_problem(post($gateway, '{}'), 400, 'no array');
is_problem(post($gateway, '[{"id":"1'), 400, 'cut off');
is_problem(post($gateway, "[]\0"), 400, 'a zero byte');
is_problem(post($gateway, "[\"\xff\"]"), 400, 'no UTF-8');
is_problem(post($gateway, '[' x 100000), 400, 'nested without end');
is_problem(post($gateway, '[{"specversion":"1.0"}]'), 422, 'an event without id', qr/element 1/);
is_problem(post($gateway, batch(map { event($_) } 1 .. 10001), 'content-encoding' => 'gzip'), 413, 'too large, and not even gzip');
is_problem(post($gateway, 'not gzip', 'content-encoding' => 'gzip'), 400, 'no gzip');
is_problem(post($gateway, substr($zipped, 0, -9), 'content-encoding' => 'gzip'), 400, 'gzip, cut off');
is_problem(post($gateway, $zipped . 'x', 'content-encoding' => 'gzip'), 400, 'gzip, and something behind it');
my $blanks = ' ' x (3 * 1024 * 1024);
my $bomb;
gzip(\$blanks => \$bomb);
is_problem(post($gateway, $bomb, 'content-encoding' => 'gzip'), 413, 'too large after decompression');
is_problem(post($gateway, sub { substr $blanks, 0, 65536, '' or undef }), 413, 'too large, in chunks');
is(received('seq > 10'), '0', 'nothing of all this was stored');
my $endless = raw($gateway, "POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer $token\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n");
{
	local $SIG{PIPE} = 'IGNORE';
	my $chunk = sprintf "%x\r\n%s\r\n", 65536, ' ' x 65536;
	my $sent = 0;
	$sent++ while $sent < 1000 && defined $endless->syswrite($chunk);
	cmp_ok($sent, '<', 1000, 'a body without end is cut off');
}
like(answer_of(raw($gateway, "nonsense\r\n\r\n")), qr/^(HTTP\/1\.[01] 400 |$)/, 'no HTTP');
like(answer_of(raw($gateway, "GET /health HTTP/1.1\r\nHost: x\r\nX: " . 'x' x 100000 . "\r\n\r\n")), qr/^(HTTP\/1\.1 4\d\d |$)/, 'endless headers');
is(request($gateway, 'GET', '/health')->{status}, 200, 'and it still serves');

# The same batch from four clients at once.
my $doubled = batch(map { event($_) } 100 .. 149);
my @clients = map { in_background(sub { post($gateway, $doubled) }) } 1 .. 4;
my ($accepted, $duplicates) = (0, 0);
for my $client (@clients)
{
	my ($status, $content) = split / /, $client->(), 2;
	my $answer = $status == 200 ? decode_json($content) : {};
	$accepted += $answer->{accepted} // 0;
	$duplicates += $answer->{duplicates} // 0;
}
is("$accepted $duplicates", '50 150', 'four times the same batch at once: one effect');

# A revoked token.
$node->safe_psql('postgres', q{SELECT softmobile.central_revoke_token('b2')});
is_problem(post($gateway, '[]', authorization => "Bearer $other"), 401, 'a revoked token');

# The database goes and comes.
$node->stop('fast');
my $down = post($gateway, batch(event(200)));
is_problem($down, 503, 'no database');
ok($down->{headers}{'retry-after'}, 'with Retry-After');
is_problem(request($gateway, 'GET', '/health'), 503, 'health without a database');
$node->start;
wait_until('the gateway has the database again', sub { request($gateway, 'GET', '/health')->{status} == 200 });
is_receipt(post($gateway, batch(event(200))), 1, 0, 'and it goes on');
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'gateway'});
is_receipt(post($gateway, batch(event(201))), 1, 0, 'a connection that was terminated is made again at once');

# Killed while a batch is being stored: sent again, it has one effect.
my $release = hold_branch();
my $batch = batch(event(300));
my $client = in_background(sub { post($gateway, $batch) });
wait_until('the request waits', sub { waiting() == 1 });
stop_gateway($gateway, 'KILL');
like($client->(), qr/^599 /, 'a gateway that is killed sends no receipt');
$gateway = start_gateway();
$release->();
wait_until('the batch is there', sub { post($gateway, $batch)->{status} == 200 });
is(received('seq = 300'), '1', 'the batch, sent again, is there once');

# SIGTERM: what runs is finished.
$release = hold_branch();
$client = in_background(sub { post($gateway, batch(event(301))) });
wait_until('the request waits', sub { waiting() == 1 });
kill 'TERM', $gateway->{pid};
$gateway->{signalled} = 1;
wait_until('nobody is let in', sub { !IO::Socket::INET->new(PeerAddr => "127.0.0.1:$gateway->{port}") && $!{ECONNREFUSED} });
is(waitpid($gateway->{pid}, WNOHANG), 0, 'after SIGTERM it finishes what runs');
$release->();
like($client->(), qr/^200 .*"accepted" : 1/, 'and sends the receipt');
is(stop_gateway($gateway), 0, 'then it ends, with 0');

# One connection, short patience.
$gateway = start_gateway('--connections', 1, '--timeout', 1, '--connections-per-address', 8);
$release = hold_branch();
is_problem(post($gateway, batch(event(302))), 503, 'a batch that cannot be stored in time', qr/at the moment/);
$release->();
is_receipt(post($gateway, batch(event(303))), 1, 0, 'the next one is');
my $slow = raw($gateway, "POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer $token\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n[");
unlike(answer_of($slow), qr/200/, 'a client that stalls is dropped');
my $drip = raw($gateway, "POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer $token\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n[");
{
	local $SIG{PIPE} = 'IGNORE';
	my $until = time + $patience;
	while (time < $until && defined $drip->syswrite(' ')) { sleep 0.1 }
	cmp_ok(time, '<', $until, 'so is one that trickles');
}
my @crowd = map { raw($gateway, '') } 1 .. 20;
my $one_more = raw($gateway, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
is(answer_of($one_more), '', 'an address has so many connections and no more');
close $_ for @crowd;
wait_until('it serves again', sub { request($gateway, 'GET', '/health')->{status} == 200 });
is(stop_gateway($gateway, 'INT'), 0, 'SIGINT ends it as well');

# TLS.
my $dir = PostgreSQL::Test::Utils::tempdir();
system_or_bail('openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '1', '-subj', '/CN=localhost', '-keyout', "$dir/key.pem", '-out', "$dir/cert.pem");
command_exit_is([ $program, '--listen', '127.0.0.1:0', '--tls-cert', "$dir/none.pem", '--tls-key', "$dir/key.pem" ], 1, 'no such certificate');
$gateway = start_gateway('--tls-cert', "$dir/cert.pem", '--tls-key', "$dir/key.pem");
my $tls = IO::Socket::SSL->new(PeerAddr => "127.0.0.1:$gateway->{port}", SSL_ca_file => "$dir/cert.pem", SSL_verifycn_name => 'localhost', SSL_verifycn_scheme => 'http')
  or diag $IO::Socket::SSL::SSL_ERROR;
print $tls "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
like(answer_of($tls), qr/^HTTP\/1\.1 200 .*"status":"ok"/s, 'over TLS');
is(stop_gateway($gateway), 0, 'and it ends');

# The log.
my $lines = slurp_file(log_file());
like($lines, qr/^\S+Z 127\.0\.0\.1 POST \/events 200 \d+ bytes \d+ ms$/m, 'each request has a line in the log');
unlike($lines, qr/$token|$other|wrong|Venta|folio/, 'with no token and no payload');

done_testing();
